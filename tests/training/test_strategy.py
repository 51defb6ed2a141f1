"""``Trainer(strategy=DFCStrategy())`` on LightningModules that know nothing of it."""

from __future__ import annotations

import csv
import random
from typing import Any

import numpy as np
import pytest
import torch
from cases.chains import close, degrees
from cases.fits import (
    BATCH,
    BATCHES,
    LEARNING,
    NO_FEEDBACK,
    SHORT,
    Innocent,
    Plain,
    by_hand,
    clusters,
    differing,
    loader,
    quiet,
    strategy,
    untouched,
    weights,
)
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger

from dfc_lightning import DFA, Backprop, DFCStrategy, FeedbackLearning, MinimumNorm

# The promise: one new word


@pytest.mark.parametrize(
    "word", [DFCStrategy, lambda: "dfc", lambda: DFCStrategy(rule=DFA()), lambda: DFCStrategy(rule=MinimumNorm())]
)
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
        quiet(word, max_epochs=3).fit(
            module, loader(clusters(dtype=torch.float64)), loader(clusters(16, 1, torch.float64))
        )
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


class Steps(DummyLogger):
    """A logger with a step for each metric: keeps those of feedback."""

    def __init__(self) -> None:
        super().__init__()
        self.of_feedback: list[Any] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.of_feedback += [step] * ("feedback/norm" in metrics)


def test_feedback_is_logged_on_its_own_steps_and_training_is_not_disturbed(tmp_path):
    module = Innocent()
    others = Steps()
    trainer = quiet(strategy(), logger=[CSVLogger(tmp_path), others], log_every_n_steps=1)
    trainer.fit(module, loader())
    rows = list(csv.DictReader(open(trainer.logger.experiment.metrics_file_path)))
    feedback = [r for r in rows if r["feedback/step"]]
    assert [float(r["feedback/step"]) for r in feedback] == list(range(1, 3 * BATCHES + 1)) == others.of_feedback
    assert [int(r["step"]) for r in feedback] == [0] * 2 * BATCHES + [BATCHES] * BATCHES  # of training, as in all rows
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


def test_a_used_strategy_starts_anew_from_a_plain_checkpoint(tmp_path):
    plain, s = quiet(max_epochs=1), strategy()
    plain.fit(Innocent(), loader())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    module = Innocent()
    quiet(s, max_epochs=1).fit(module, loader())
    quiet(s, accelerator="auto").fit(module, loader(), ckpt_path=tmp_path / "plain.ckpt")
    assert s.learner.steps == 2 * BATCHES


def test_other_rules_keep_no_learner(tmp_path):
    trainer = quiet(DFCStrategy(rule=DFA(), seed=1), max_epochs=1)
    trainer.fit(Innocent(), loader())
    trainer.save_checkpoint(tmp_path / "dfa.ckpt")
    resumed = DFCStrategy(rule=DFA(), seed=2)
    quiet(resumed).fit(Innocent(), loader(), ckpt_path=tmp_path / "dfa.ckpt")
    assert not differing(resumed.network.state_dict(), trainer.strategy.network.state_dict())
