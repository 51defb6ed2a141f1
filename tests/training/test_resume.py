"""A run that is interrupted and resumed is bit for bit the run that was not."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from cases.fits import (
    BATCH,
    BATCHES,
    SHORT,
    Innocent,
    clusters,
    differing,
    loader,
    quiet,
    strategy,
)
from cases.interruptions import PASS, Interrupt, interrupted, raise_at, run, sigterm_at
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import Dataset

from dfc_lightning import FeedbackLearning


@pytest.fixture(scope="module")
def straight() -> dict[str, Any]:
    return run()


POINTS = {
    "first call": 0,
    "within the initial pass": 3,
    "last batch of the initial pass": PASS - 1,
    "first batch of the first epoch's pass": PASS,
    "within the first epoch's pass": PASS + 2,
    "first training batch": 2 * PASS,
    "within the first epoch": 2 * PASS + 3,
    "last training batch": 3 * PASS - 1,
    "first batch of the second epoch's pass": 3 * PASS,
    "within the second epoch's pass": 3 * PASS + 2,
    "within the second epoch": 4 * PASS + 2,
    "last batch of the last pass": 6 * PASS - 1,
    "last batch of all": 7 * PASS - 1,
}


@pytest.mark.parametrize("where", POINTS)
def test_raised_in_a_step(where, straight, tmp_path):
    path = interrupted(tmp_path, at_call=raise_at(POINTS[where]))
    assert not differing(run(path), straight)


@pytest.mark.parametrize(
    "where", ["within the initial pass", "within the second epoch's pass", "within the second epoch"]
)
def test_interrupted_twice(where, straight, tmp_path):
    path = interrupted(tmp_path, at_call=raise_at(POINTS[where]))
    again = interrupted(tmp_path / "again", ckpt_path=path, at_call=raise_at(1))
    assert not differing(run(again), straight)


@pytest.mark.parametrize("where", ["within the initial pass", "within the second epoch's pass"])
def test_terminated_in_a_feedback_pass(where, straight, tmp_path):
    path = interrupted(tmp_path, SIGTERMException, at_call=sigterm_at(POINTS[where]))
    saved = torch.load(path, weights_only=True)["dfc_lightning"]["stages"]
    assert saved["batches"] == POINTS[where] % PASS + 1  # the step under way was finished, and no more
    assert not differing(run(path), straight)


SETTINGS = {
    "accumulation": {"accumulate_grad_batches": 2},
    "limit": {"limit_train_batches": 4},
    "validation within epochs": {"val": True, "val_check_interval": 2},
    "step limit": {"max_epochs": -1, "max_steps": 12},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("call", [2, 7, 12, 22])
def test_with_settings_of_the_trainer(name, call, tmp_path):
    settings = SETTINGS[name]
    path = interrupted(tmp_path, at_call=raise_at(call), **settings)
    assert not differing(run(path, **settings), run(**settings))


@pytest.mark.slow
@pytest.mark.parametrize("call", [3, 2 * PASS + 3, 3 * PASS + 2])
def test_with_feedback_from_jacobians(call, tmp_path):
    path = interrupted(tmp_path, at_call=raise_at(call), feedback_init="jacobian")
    assert not differing(run(path, feedback_init="jacobian"), run(feedback_init="jacobian"))


def test_noise_in_the_step_depends_on_the_pass_and_the_step_alone(tmp_path):
    learning = FeedbackLearning(method=SHORT, initial_passes=2, passes_per_epoch=0)

    def noisy(fail_at: int | None):
        def act(call: int) -> None:
            raise_at(fail_at)(call)
            module.net[0].bias.data.copy_(0.1 * torch.randn(12))

        module = Innocent()
        module.at_call = act
        return module

    whole = run(module=noisy(None), learning=learning, max_epochs=1)
    path = interrupted(tmp_path, module=noisy(7), learning=learning)
    torch.manual_seed(1234)
    resumed = run(path, module=noisy(None), learning=learning, max_epochs=1)
    assert not differing(resumed["feedback"], whole["feedback"])


class Fragile(Dataset):
    """Data of which the k-th fetch fails."""

    def __init__(self, fail_at: int) -> None:
        self.data, self.fetched, self.fail_at = clusters(), 0, fail_at

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        self.fetched += 1
        if self.fetched == self.fail_at:
            raise Interrupt
        return self.data[index]


@pytest.mark.slow
@pytest.mark.parametrize("batches", [2.5, 7.5, 12.5, 18.5, 24.5])
def test_raised_in_the_data(batches, straight, tmp_path):
    path = interrupted(tmp_path, data=loader(Fragile(int(batches * BATCH))))
    assert not differing(run(path), straight)


class Raises(Callback):
    """Raises in one of the trainer's hooks, the second time it is called."""

    def __init__(self, hook: str) -> None:
        self.count = 0
        setattr(self, hook, self.act)

    def act(self, *args: Any, **kwargs: Any) -> None:
        self.count += 1
        if self.count == 2:
            raise Interrupt


HOOKS = ("on_train_epoch_end", "on_validation_start", "on_validation_epoch_end")


@pytest.mark.parametrize("hook", HOOKS)
def test_raised_between_epochs(hook, straight, tmp_path):
    path = interrupted(tmp_path, callbacks=[Raises(hook)], val=True)
    resumed = run(path, val=True)
    assert not differing(resumed["feedback"], straight["feedback"]) and not differing(
        resumed["learner"], straight["learner"]
    )
    assert not differing(parameters(resumed), parameters(straight)) and not differing(
        resumed["optimizer"]["state"], straight["optimizer"]["state"]
    )


def parameters(found: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in found["weights"].items() if k.startswith("net.")}


def test_a_finished_run_goes_on(straight, tmp_path):
    module, short = Innocent(), quiet(strategy(), max_epochs=1)
    short.fit(module, loader())
    short.save_checkpoint(tmp_path / "short.ckpt")
    assert not differing(run(tmp_path / "short.ckpt"), straight)


@pytest.mark.slow
@pytest.mark.parametrize("every", [3, BATCHES, 7])
def test_from_the_checkpoints_of_a_callback(every, straight, tmp_path):
    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=every)
    assert not differing(run(callbacks=[keep], enable_checkpointing=True), straight)
    for path in sorted(tmp_path.glob("*.ckpt")):
        assert not differing(run(str(path)), straight), path.name


@pytest.mark.slow
@pytest.mark.parametrize("call", [2 * PASS + 3, 3 * PASS - 1, 4 * PASS + 2])
def test_with_feedback_steps_between_batches(call, tmp_path):
    learning = FeedbackLearning(method=SHORT, every_n_batches=2)
    path = interrupted(tmp_path, at_call=raise_at(call), learning=learning)
    assert not differing(run(path, learning=learning), run(learning=learning))


@pytest.mark.parametrize("call", [3, 3 * PASS + 2])
def test_a_shuffled_pass_is_resumed_in_its_own_order(call, tmp_path):
    """The forward epoch's order is Lightning's business; here it's on hold, and the passes' order is looked at."""
    learning = FeedbackLearning(method=SHORT, initial_passes=2, passes_per_epoch=0)
    shuffled = lambda: loader(shuffle=True)  # noqa: E731
    whole = run(data=shuffled(), learning=learning, seed=3, max_epochs=1)
    path = interrupted(tmp_path, at_call=raise_at(call % (2 * PASS)), data=shuffled(), learning=learning, seed=3)
    torch.manual_seed(1234)
    np.random.seed(5)
    random.seed(5)
    resumed = run(path, data=shuffled(), learning=learning, seed=3, max_epochs=1)
    assert not differing(resumed["feedback"], whole["feedback"])


class Augmented(Dataset):
    """Noise from each of the three global generators."""

    def __init__(self) -> None:
        self.data = clusters()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        x, y = self.data[index]
        return x + random.random() + float(np.random.rand()) + torch.rand(()), y


def test_augmentation_in_a_pass_depends_on_the_pass_alone(tmp_path):
    learning = FeedbackLearning(method=SHORT, initial_passes=2, passes_per_epoch=0)
    whole = run(data=loader(Augmented()), learning=learning, max_epochs=1)
    path = interrupted(tmp_path, at_call=raise_at(7), data=loader(Augmented()), learning=learning)
    torch.manual_seed(1234)
    np.random.seed(5)
    random.seed(5)
    resumed = run(path, data=loader(Augmented()), learning=learning, max_epochs=1)
    assert not differing(resumed["feedback"], whole["feedback"])


def test_the_seed_that_followed_torch_is_the_checkpoints(tmp_path):
    """A new process has another seed of its own; noise and order of a run stay what they were."""
    torch.manual_seed(1)
    whole = run(seed=None)
    torch.manual_seed(1)
    path = interrupted(tmp_path, at_call=raise_at(2), seed=None)
    torch.manual_seed(2)
    assert not differing(run(path, seed=None), whole)
