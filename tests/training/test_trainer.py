"""What else a Trainer can do, it can do with DFCStrategy."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from cases.chains import close
from cases.fits import (
    BATCH,
    BATCHES,
    NO_FEEDBACK,
    SHORT,
    Innocent,
    Plain,
    clusters,
    loader,
    quiet,
    strategy,
    untouched,
    weights,
)
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    RichProgressBar,
    StochasticWeightAveraging,
    TQDMProgressBar,
)
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader

from dfc_lightning import FeedbackLearning


def test_two_accumulated_batches_are_one_of_twice_the_size():
    data, ends = clusters(64, dtype=torch.float64), []
    for size, settings in ((16, {}), (8, {"accumulate_grad_batches": 2})):
        module = Innocent().double()
        quiet(strategy(feedback=NO_FEEDBACK), **settings).fit(module, loader(data, size))
        ends.append(weights(module))
    assert close(ends[0], ends[1], 1e-10)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped(algorithm):
    class Norms(Callback):
        found: list[float] = []

        def on_before_optimizer_step(self, trainer, module, optimizer):
            module.configure_gradient_clipping(optimizer, 1e-3, algorithm)
            grads = torch.cat([p.grad.flatten() for p in module.parameters()])
            self.found.append(float(grads.norm() if algorithm == "norm" else grads.abs().max()))

    norms = Norms()
    quiet(strategy(), gradient_clip_val=1e-3, gradient_clip_algorithm=algorithm, callbacks=[norms]).fit(
        Innocent(), loader()
    )
    assert norms.found and max(norms.found) <= 1.001e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "precision, dtype", [("64-true", torch.float64), ("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)]
)
def test_precision(precision, dtype):
    module, s = Innocent(lr=0.02), strategy()
    trainer = quiet(s, precision=precision, max_epochs=8)
    trainer.fit(module, loader(), loader(clusters(100, 1), 100))
    assert module.net[0].weight.dtype == dtype and s.network.feedback[0].dtype == torch.promote_types(
        dtype, torch.float32
    )
    assert weights(module).isfinite().all() and trainer.callback_metrics["val_accuracy"] > 0.7


@pytest.mark.parametrize(
    "settings, calls", [({"limit_train_batches": 2}, 2), ({"limit_train_batches": 0.6}, 3), ({"overfit_batches": 1}, 1)]
)
def test_feedback_passes_respect_limits(settings, calls):
    module, s = Innocent(), strategy()
    quiet(s, max_epochs=1, **settings).fit(module, loader())
    assert s.learner.steps == 2 * calls and module.calls == 3 * calls


def test_workers_that_persist_give_full_epochs():
    module, s = Innocent(), strategy()
    quiet(s).fit(module, loader(num_workers=1, persistent_workers=True, multiprocessing_context="fork"))
    assert s.learner.steps == 3 * BATCHES and module.calls == 5 * BATCHES


def two_streams(module: Innocent, batch: Any) -> torch.Tensor:
    x, y = (torch.cat(parts) for parts in zip(*(batch.values() if isinstance(batch, dict) else batch)))
    return F.cross_entropy(module(x), y)


LOADERS = {
    "dict": lambda a, b: {"a": a, "b": b},
    "list": lambda a, b: [a, b],
    "combined, min_size": lambda a, b: CombinedLoader({"a": a, "b": b}, "min_size"),
    "combined, max_size_cycle": lambda a, b: CombinedLoader([a, b], "max_size_cycle"),
}


@pytest.mark.parametrize("name", LOADERS)
def test_several_loaders(name):
    module, s = Plain(two_streams), strategy()
    pair = LOADERS[name](loader(), loader(clusters(7 * BATCH, 3)))
    trainer = quiet(s)
    trainer.fit(module, pair)
    assert trainer.global_step == 2 * (5 if name == "combined, min_size" else 7)
    assert s.learner.steps == 3 * trainer.global_step // 2


def test_loaders_that_are_no_dataloader():
    class Batches:
        def __iter__(self):
            return iter(loader())

    module, s = Plain(), strategy()
    quiet(s, limit_train_batches=4).fit(module, Batches())
    assert s.learner.steps == 4 + 4  # in hand: nothing tells that they could be drawn again


def test_a_batch_may_be_skipped():
    dull = float(next(iter(loader()))[0].sum())
    module = Plain(lambda m, batch: None if batch[0].sum() == dull else F.cross_entropy(m(batch[0]), batch[1]))
    s = strategy(feedback=FeedbackLearning(method=SHORT, every_n_batches=1))
    trainer = quiet(s)
    trainer.fit(module, loader())
    assert s.learner.steps == 5 * (BATCHES - 1) and untouched(module)


@pytest.mark.parametrize("again", ["same trainer", "new trainer", "all new but the module"])
def test_a_second_fit_has_its_feedback_passes_too(again):
    module, s = Innocent(), strategy()
    trainer = quiet(s)
    trainer.fit(module, loader())
    steps = s.learner.steps
    if again == "same trainer":
        trainer.fit_loop.max_epochs = 4
        trainer.fit(module, loader())
        assert s.learner.steps == steps + 2 * BATCHES
    elif again == "new trainer":
        quiet(s, accelerator="auto").fit(module, loader())
        assert s.learner.steps == steps + 2 * BATCHES
    else:
        s = strategy()
        quiet(s).fit(module, loader())
        assert s.learner.steps == steps
    assert untouched(module)


def test_one_strategy_for_a_second_module_starts_anew():
    s = strategy()
    quiet(s).fit(Innocent(), loader())
    quiet(s, accelerator="auto").fit(second := Innocent(), loader())
    quiet(strategy()).fit(alone := Innocent(), loader())
    assert torch.equal(weights(second), weights(alone))


@pytest.mark.parametrize(
    "callback",
    [lambda: EarlyStopping("val_accuracy", mode="max", patience=1), lambda: StochasticWeightAveraging(0.01, 1)],
)
def test_callbacks_work(callback):
    module = Innocent()
    quiet(strategy(), max_epochs=4, callbacks=[callback()]).fit(module, loader(), loader(clusters(16, 1)))
    assert weights(module).isfinite().all()


def test_the_learning_rate_finder_leaves_the_run_as_it_was(tmp_path):
    module, s = Innocent(), strategy()
    module.lr = 0.01
    trainer = quiet(s, default_root_dir=tmp_path)
    Tuner(trainer).lr_find(module, loader(), num_training=4, update_attr=False)
    trainer.fit(module, loader())
    quiet(strategy()).fit(alone := Innocent(), loader())
    assert torch.equal(weights(module), weights(alone)) and s.learner.steps == 3 * BATCHES


@pytest.mark.parametrize("shown", [True, False])
def test_stages_show_in_the_progress_bar(shown, capfd):
    settings = {"callbacks": [TQDMProgressBar()]} if shown else {}
    quiet(strategy(), enable_progress_bar=shown, **settings).fit(Innocent(), loader())
    text = "".join(capfd.readouterr())
    assert ("initial feedback pass 1/1" in text and f"{BATCHES}/{BATCHES}" in text) == shown
    assert ("feedback pass" in text) == shown


def test_the_rich_bar_is_redrawn_as_stages_proceed():
    drawn = []

    class Watched(RichProgressBar):
        def refresh(self, **hard: bool) -> None:  # Lightning 2.5 has no argument
            super().refresh(**hard)
            drawn.extend(int(t.completed) for t in self.progress.tasks if "feedback" in t.description and t.visible)

    quiet(strategy(), enable_progress_bar=True, callbacks=[Watched()]).fit(Innocent(), loader())
    assert set(range(1, BATCHES + 1)) <= set(drawn)


def test_a_loader_made_anew_each_epoch():
    class Reloading(L.LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            return loader()

    s = strategy()
    quiet(s, reload_dataloaders_every_n_epochs=1).fit(Innocent(), datamodule=Reloading())
    assert s.learner.steps == 3 * BATCHES
