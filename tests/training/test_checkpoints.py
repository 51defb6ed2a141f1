"""Checkpoints after SIGKILL, from other numbers of processes, of shuffled data; and bad ones."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from cases.fits import (
    LEARNING,
    Innocent,
    clusters,
    differing,
    loader,
    quiet,
    saver,
    strategy,
    untouched,
)
from cases.interruptions import PASS, Interrupt, interrupted, raise_at, run
from cases.paths import TESTS
from cases.processes import CASES, Witnessed, distance, fit, learned, spawn
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from dfc_lightning import ControlError, FeedbackLearning

# Killed


def killed_at(call: str, folder: str) -> None:
    """Train, save after every second training step, and die in the given call of training_step."""

    def die(k: int) -> None:
        if k == int(call):
            os.kill(os.getpid(), signal.SIGKILL)

    keep = ModelCheckpoint(folder, "last", every_n_train_steps=2, enable_version_counter=False)
    run(at_call=die, callbacks=[keep], enable_checkpointing=True)


@pytest.mark.processes
def test_killed_and_resumed_from_the_last_checkpoint(tmp_path):
    call = 4 * PASS + 3  # within the second epoch
    here = [str(TESTS), str(Path(__file__).parent)]
    code = "import sys; sys.path[:0] = sys.argv[1:3]; import test_checkpoints as t; t.killed_at(*sys.argv[3:])"
    command = [sys.executable, "-c", code, *here, str(call), str(tmp_path)]
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL
    assert not differing(run(str(tmp_path / "last.ckpt")), run())


# Other numbers of processes

MOVED = {**CASES["sampled feedback"], "trainer": {}}


def interrupted_in(call: int, processes: int, folder: Any) -> None:
    module = Witnessed()
    module.at_call = Raiser(call)
    with pytest.raises(Interrupt):
        fit(MOVED, processes, module=module, callbacks=[saver(folder)], enable_checkpointing=True)


class Raiser:
    def __init__(self, call: int) -> None:
        self.call = call

    def __call__(self, call: int) -> None:
        if call == self.call:
            raise Interrupt


WHERE = {"in a feedback pass": 7, "in an epoch": 3 * 5 + 3}


def on_two(rank: int, processes: int, folder: str) -> None:
    for where, call in WHERE.items():
        interrupted_in(call, processes, Path(folder, "two", where))
        trainer, module = fit(MOVED, processes, ckpt_path=Path(folder, "one", where, "interrupted.ckpt"))
        if rank == 0:
            torch.save(learned(trainer, module), Path(folder, f"{where}.pt"))


@pytest.mark.processes
def test_from_one_process_to_two_and_back(tmp_path):
    for where, call in WHERE.items():
        interrupted_in(call, 1, tmp_path / "one" / where)
    spawn(on_two, 2, tmp_path)
    straight = learned(*fit(MOVED, 1))
    for where in WHERE:
        from_two = learned(*fit(MOVED, 1, ckpt_path=tmp_path / "two" / where / "interrupted.ckpt"))
        for moved in (from_two, torch.load(tmp_path / f"{where}.pt")):
            apart = distance(straight, moved)
            assert max(apart.values()) < 1e-10, max(apart, key=apart.get)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("call", [3, 3 * PASS + 2, 4 * PASS + 3])
def test_resumed_exactly_in_other_precisions(precision, call, tmp_path):
    path = interrupted(tmp_path, at_call=raise_at(call), precision=precision)
    assert not differing(run(path, precision=precision), run(precision=precision))


# Shuffled data


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("call", [3, 2 * PASS + 3, 3 * PASS + 2, 4 * PASS + 3])
def test_an_order_that_depends_on_the_epoch_is_resumed_exactly(call, workers, tmp_path):
    def data() -> Any:
        return loader(sampler=DistributedSampler(clusters(), 1, 0), num_workers=workers)

    path = interrupted(tmp_path, at_call=raise_at(call), data=data())
    assert not differing(run(path, data=data()), run(data=data()))


# Not what they should be


class Wider(Innocent):
    def __init__(self) -> None:
        super().__init__()
        self.net[0], self.net[2] = nn.Linear(6, 20), nn.Linear(20, 8)


class Other(Innocent):
    def __init__(self) -> None:
        super().__init__()
        self.chain = self.net
        del self.net

    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x)


def of(module: Innocent, **settings: Any) -> Callable[[Path, dict[str, Any]], None]:
    """A checkpoint of another module or strategy."""

    def write(path: Path, good: dict[str, Any]) -> None:
        trainer = quiet(strategy(**settings), max_epochs=1)
        trainer.fit(module, loader())
        trainer.save_checkpoint(path)

    return write


def altered(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path, dict[str, Any]], None]:
    def write(path: Path, good: dict[str, Any]) -> None:
        changed = change(good)
        torch.save(good if changed is None else changed, path)

    return write


def bytes_of(cut: Callable[[bytes], bytes]) -> Callable[[Path, dict[str, Any]], None]:
    def write(path: Path, good: dict[str, Any]) -> None:
        torch.save(good, path)
        path.write_bytes(cut(path.read_bytes()))

    return write


def ours(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path, dict[str, Any]], None]:
    def act(good: dict[str, Any]) -> None:
        change(good["dfc_lightning"])

    return altered(act)


def broken_q(good: dict[str, Any]) -> None:
    good["feedback"]["net.2"] = torch.zeros(8, 4)


def broken_moments(good: dict[str, Any]) -> None:
    good["learner"]["optimizer"]["state"][1]["exp_avg"] = torch.zeros(5, 5)


UNREADABLE, FOREIGN, UNFIT = "cannot be read", "not a checkpoint written by a Trainer", "does not fit this run"
FEWER = FeedbackLearning(method=LEARNING.method, train_output=False)
BAD: dict[str, tuple[Any, str]] = {
    "truncated": (bytes_of(lambda b: b[: len(b) // 2]), UNREADABLE),
    "a byte short": (bytes_of(lambda b: b[:-1]), UNREADABLE),
    "empty": (bytes_of(lambda b: b""), UNREADABLE),
    "text": (bytes_of(lambda b: b"lr: 0.1\n"), UNREADABLE),
    "a list": (altered(lambda good: [1, 2]), FOREIGN),
    "weights alone": (altered(lambda good: good["state_dict"]), FOREIGN),
    "no weights": (altered(lambda good: good.pop("state_dict") and None), FOREIGN),
    "another width": (of(Wider()), "size mismatch|does not fit this run"),
    "other layers": (of(Other()), "Missing key|does not fit this run"),
    "another project's": (altered(lambda good: good.update(dfc_lightning={"version": 3})), UNFIT),
    "another project's text": (altered(lambda good: good.update(dfc_lightning="1.0")), UNFIT),
    "another project's number": (altered(lambda good: good.update(dfc_lightning=1)), UNFIT),
    "no learner": (ours(lambda state: state.pop("learner")), UNFIT),
    "no Q": (ours(lambda state: state.update(feedback=None)), UNFIT),
    "Q of another width": (ours(broken_q), UNFIT),
    "a layer's Q missing": (ours(lambda state: state["feedback"].pop("net.2")), UNFIT),
    "other stages": (ours(lambda state: state.update(stages={"epochs": 3})), UNFIT),
    "no steps": (ours(lambda state: state["learner"].pop("steps")), UNFIT),
    "another number of learned Q": (of(Innocent(), feedback=FEWER), UNFIT),
    "moments of another shape": (ours(broken_moments), UNFIT),
    "no optimizer": (altered(lambda good: good.pop("optimizer_states") and None), "contains only the model"),
    "another optimizer": (
        altered(lambda good: good["optimizer_states"][0]["param_groups"].append({"params": [9], "lr": 1})),
        "parameter groups",
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("good") / "good.ckpt"
    trainer = quiet(strategy(), max_epochs=1)
    trainer.fit(Innocent(seed=1), loader(clusters(seed=3)))
    trainer.save_checkpoint(path)
    return path


def used_before(s: Any) -> Any:
    """The strategy, for another trainer: Lightning leaves its accelerator in it, and takes it for a wish."""
    s._accelerator = None
    return s


def holdings(s: Any) -> Any:
    if s.network is None:
        return None
    return [s.network.state_dict(), s.network.seed, s.learner.state_dict()]


@pytest.mark.parametrize("used", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["first fit", "later fit"])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_checkpoint_is_named_and_touches_nothing(name, used, good, tmp_path):
    write, message = BAD[name]
    path = tmp_path / "bad.ckpt"
    write(path, torch.load(good, weights_only=True))
    module, s = Innocent(), strategy()
    if used:
        quiet(s, max_epochs=1).fit(module, loader())
        s = used_before(s)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    held, module.calls = holdings(s), 0
    with pytest.raises((ControlError, RuntimeError, KeyError, ValueError), match=message):
        quiet(s, max_epochs=3).fit(module, loader(), ckpt_path=path)
    assert module.calls == 0 and untouched(module)
    assert not differing(dict(module.state_dict()), before)
    assert not differing(holdings(s), held) if used else True
    quiet(used_before(s), max_epochs=3).fit(module, loader(), ckpt_path=good)  # and the run can go on from a good one
    assert not differing(holdings(s), holdings_of(good))


_REACHED: dict[Path, Any] = {}


def holdings_of(good: Path) -> Any:
    if good not in _REACHED:
        s = strategy()
        quiet(s, max_epochs=3).fit(Innocent(), loader(), ckpt_path=good)
        _REACHED[good] = holdings(s)
    return _REACHED[good]


def test_an_error_in_training_does_not_take_the_weights_back(good):
    module, s = Innocent(), strategy()
    module.at_call = raise_at(PASS + 2)
    with pytest.raises(Interrupt):
        quiet(s, max_epochs=3).fit(module, loader(), ckpt_path=good)
    assert not differing(dict(module.net.state_dict()), dict(Innocent().net.state_dict())) == []
    quiet(used_before(s), max_epochs=1).fit(Innocent(), loader(), ckpt_path=good)  # nothing left to train
    after = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(Interrupt):
        quiet(used_before(s), max_epochs=3).fit(module, loader())
    assert not differing(dict(module.net.state_dict()), {k[4:]: v for k, v in after.items() if k.startswith("net.")})


@pytest.mark.skipif("weights_only" not in inspect.signature(L.Trainer.fit).parameters, reason="since Lightning 2.6")
def test_loads_with_weights_only(good):
    s = strategy()
    quiet(s, max_epochs=3).fit(Innocent(), loader(), ckpt_path=good, weights_only=True)
    assert not differing(holdings(s), holdings_of(good))


def test_evaluation_asks_for_weights_alone(good, tmp_path):
    """A checkpoint whose feedback weights fit no longer can still be validated."""
    state = torch.load(good, weights_only=True)
    state["dfc_lightning"] = {"version": 3}
    torch.save(state, tmp_path / "other.ckpt")
    module = Innocent()
    found = quiet(strategy()).validate(
        module, loader(clusters(40, 1)), ckpt_path=tmp_path / "other.ckpt", verbose=False
    )
    assert 0 <= found[0]["val_accuracy"] <= 1
    assert not differing(dict(module.state_dict())["net.0.weight"], state["state_dict"]["net.0.weight"])
