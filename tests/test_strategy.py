"""``Trainer(strategy=DFCStrategy())`` on LightningModules that know nothing of it."""

from __future__ import annotations

import csv
import random
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, EarlyStopping, StochasticWeightAveraging, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader

from cases import close, degrees
from dfc_lightning import DFA, Backprop, DFCStrategy, FeedbackLearning, MinimumNorm
from lightning_cases import BATCH, BATCHES, LEARNING, SHORT, Innocent, Plain, by_hand, clusters, differing, loader, quiet, strategy
from lightning_cases import untouched

NO_FEEDBACK = FeedbackLearning(initial_passes=0, passes_per_epoch=0)


def weights(module: L.LightningModule) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


# The promise: one new word


@pytest.mark.parametrize("word", [DFCStrategy, lambda: "dfc", lambda: DFCStrategy(rule=DFA()), lambda: DFCStrategy(rule=MinimumNorm())])
def test_an_unmodified_module_learns(word):
    module, held_out = Innocent(), loader(clusters(200, seed=1), 200)
    before, keys = weights(module), list(Innocent().state_dict())
    trainer = quiet(word(), max_epochs=12)
    trainer.fit(module, loader(clusters(80), shuffle=True), held_out)
    assert trainer.callback_metrics["val_accuracy"] > 0.8
    assert list(module.state_dict()) == keys and untouched(module)
    assert not torch.equal(weights(module), before)
    assert trainer.validate(module, held_out, verbose=False)[0]["val_accuracy"] > 0.8


def test_backprop_as_a_rule_is_lightning_without_the_strategy():
    plain, ours = Innocent().double(), Innocent().double()
    for module, word in ((plain, "auto"), (ours, DFCStrategy(rule=Backprop()))):
        quiet(word, max_epochs=3).fit(module, loader(clusters(dtype=torch.float64)), loader(clusters(16, 1, torch.float64)))
    assert close(weights(ours), weights(plain), 1e-10)
    assert not differing(ours.accuracy.state_dict(), plain.accuracy.state_dict())


def test_dfc_is_not_backprop():
    plain, ours = Innocent(), Innocent()
    quiet().fit(plain, loader())
    quiet(strategy()).fit(ours, loader())
    start = weights(Innocent())
    assert degrees(weights(ours) - start, weights(plain) - start) > 3


@pytest.mark.parametrize(
    "learning",
    [
        LEARNING,
        NO_FEEDBACK,
        FeedbackLearning(method=SHORT, initial_passes=2, passes_per_epoch=3, initial_lr=0.1),
        FeedbackLearning(method=SHORT, initial_passes=0, passes_per_epoch=0, every_n_batches=1),
        FeedbackLearning(method=SHORT, passes_per_epoch=0, every_n_batches=2, train_output=False),
    ],
    ids=["default passes", "fixed", "more passes", "every batch", "every second batch"],
)
def test_the_strategy_does_what_a_loop_by_hand_does(learning):
    data = clusters(dtype=torch.float64)
    ours, mine = Innocent().double(), Innocent().double()
    s = strategy(feedback=learning)
    quiet(s).fit(ours, loader(data))
    settings = mine.configure_optimizers()
    net, learner = by_hand(mine.net, list(loader(data)), *settings.values(), learning=learning)
    assert torch.equal(weights(ours), weights(mine))
    assert not differing(list(s.network.state_dict().values()), list(net.state_dict().values()))
    assert s.learner.steps == learner.steps
    assert not differing(s.learner.state_dict(), learner.state_dict())


# Feedback passes leave everything else alone


class Witness(Callback):
    """Notes what a user could see before and after the feedback passes of each epoch."""

    def __init__(self) -> None:
        self.calls, self.seen = [], []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.calls.append(module.calls)
        self.before = self.look(trainer, module)
        module.at_call = lambda call: self.seen.append((self.before, self.look(trainer, module)))

    def look(self, trainer: Any, module: Any) -> dict[str, Any]:
        return {
            "steps": (trainer.global_step, trainer.current_epoch, trainer.fit_loop.total_batch_idx),
            "scheduler": trainer.lr_scheduler_configs[0].scheduler.last_epoch,
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state()[1].tolist(),
            "random": random.getstate(),
            "metrics": {k: v.clone() for k, v in module.accuracy.metric_state.items()},
            "logged": {k: v.clone() for k, v in trainer.callback_metrics.items()},
            "weights": weights(module),
            "mode": module.training,
            "grads": [p.grad is None for p in module.parameters()],
        }


@pytest.mark.parametrize("shuffle", [False, True])
def test_feedback_passes_move_nothing_but_the_feedback(shuffle):
    witness, module = Witness(), Innocent()
    quiet(strategy(), callbacks=[witness]).fit(module, loader(shuffle=shuffle))
    assert module.calls == 2 * BATCHES + BATCHES + 2 * BATCHES
    last = [pair for k, pair in enumerate(witness.seen) if k in (2 * BATCHES, 4 * BATCHES)]
    for before, after in last:  # the training step that follows a pass
        assert not differing(before, after, "")


def test_metrics_updated_before_the_forward_pass_count_training_batches_only():
    plain, ours = Innocent(), Innocent()
    noted = []
    for module, word in ((plain, "auto"), (ours, strategy())):
        trainer = quiet(word, max_epochs=1)
        trainer.fit(module, loader())
        noted.append(float(trainer.callback_metrics["samples_epoch"]))
    assert noted == [BATCHES * BATCH, BATCHES * BATCH]


class Order(Plain):
    """Notes the batches it trains on."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[float] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.order.append(float(batch[0].sum()))


@pytest.mark.parametrize("own", [False, True], ids=["global generator", "the loader's own generator"])
def test_the_order_of_training_batches_is_what_it_is_without_the_strategy(own):
    orders = []
    for word in ("auto", strategy()):
        torch.manual_seed(5)
        module = Order()
        generator = torch.Generator().manual_seed(2) if own else None
        quiet(word).fit(module, loader(shuffle=True, generator=generator))
        orders.append(module.order)
    assert orders[0] == orders[1]


def test_feedback_is_logged_on_its_own_steps_and_training_is_not_disturbed(tmp_path):
    module = Innocent()
    trainer = quiet(strategy(), logger=CSVLogger(tmp_path), log_every_n_steps=1)
    trainer.fit(module, loader())
    rows = list(csv.DictReader(open(trainer.logger.experiment.metrics_file_path)))
    assert [float(r["feedback/step"]) for r in rows if r["feedback/step"]] == list(range(1, 3 * BATCHES + 1))
    assert [int(r["step"]) for r in rows if r["samples_step"]] == list(range(2 * BATCHES))
    assert sum(bool(r["settling/converged"]) for r in rows) == 2 * BATCHES


# Checkpoints


def test_a_checkpoint_holds_q_and_is_otherwise_a_plain_one(tmp_path):
    module, s = Innocent(), strategy()
    trainer = quiet(s, max_epochs=1)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "dfc.ckpt")
    saved = torch.load(tmp_path / "dfc.ckpt", weights_only=True)
    assert not differing(saved["dfc_lightning"]["feedback"], s.network.state_dict())
    assert [q.shape for q in saved["dfc_lightning"]["feedback"].values()] == [(12, 3), (8, 3), (3, 3)]
    loaded = Innocent.load_from_checkpoint(tmp_path / "dfc.ckpt")
    assert torch.equal(weights(loaded), weights(module))
    plain = quiet(max_epochs=3)
    plain.fit(loaded, loader(), ckpt_path=tmp_path / "dfc.ckpt")
    assert plain.global_step == 3 * BATCHES and not torch.equal(weights(loaded), weights(module))


def test_a_backprop_run_goes_on_with_feedback_control(tmp_path):
    module = Innocent()
    plain = quiet(max_epochs=1)
    plain.fit(module, loader())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    s = strategy()
    quiet(s, max_epochs=3).fit(Innocent(), loader(), ckpt_path=tmp_path / "plain.ckpt")
    assert s.learner.steps == BATCHES * (1 + 2) and s.stages.progress.initial_done


def test_other_rules_keep_no_learner(tmp_path):
    trainer = quiet(DFCStrategy(rule=DFA(), seed=1), max_epochs=1)
    trainer.fit(Innocent(), loader())
    trainer.save_checkpoint(tmp_path / "dfa.ckpt")
    resumed = DFCStrategy(rule=DFA(), seed=2)
    quiet(resumed).fit(Innocent(), loader(), ckpt_path=tmp_path / "dfa.ckpt")
    assert not differing(resumed.network.state_dict(), trainer.strategy.network.state_dict())


# What a Trainer can do


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
    quiet(strategy(), gradient_clip_val=1e-3, gradient_clip_algorithm=algorithm, callbacks=[norms]).fit(Innocent(), loader())
    assert norms.found and max(norms.found) <= 1.001e-3


@pytest.mark.parametrize("precision, dtype", [("64-true", torch.float64), ("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)])
def test_precision(precision, dtype):
    module, s = Innocent(lr=0.02), strategy()
    trainer = quiet(s, precision=precision, max_epochs=8)
    trainer.fit(module, loader(), loader(clusters(100, 1), 100))
    assert module.net[0].weight.dtype == dtype and s.network.feedback[0].dtype == torch.promote_types(dtype, torch.float32)
    assert weights(module).isfinite().all() and trainer.callback_metrics["val_accuracy"] > 0.7


@pytest.mark.parametrize("settings, calls", [({"limit_train_batches": 2}, 2), ({"limit_train_batches": 0.6}, 3), ({"overfit_batches": 1}, 1)])
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
    assert s.learner.steps == 3 * 4


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


@pytest.mark.parametrize("callback", [lambda: EarlyStopping("val_accuracy", mode="max", patience=1), lambda: StochasticWeightAveraging(0.01, 1)])
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


def test_a_loader_made_anew_each_epoch():
    class Reloading(L.LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            return loader()

    s = strategy()
    quiet(s, reload_dataloaders_every_n_epochs=1).fit(Innocent(), datamodule=Reloading())
    assert s.learner.steps == 3 * BATCHES
