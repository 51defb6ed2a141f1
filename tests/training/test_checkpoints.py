"""Checkpoints after SIGKILL, from other numbers of processes, of shuffled data; and bad ones."""

from __future__ import annotations

import errno
import functools
import inspect
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
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
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
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


# What is Lightning's in them, and what was never a number


def at(*keys: Any, value: Any) -> Callable[[Path, dict[str, Any]], None]:
    """A good checkpoint with one entry changed."""

    def change(good: dict[str, Any]) -> None:
        inner: Any = good
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value

    return altered(change)


OPTIMIZER, LOOP = ("optimizer_states", 0), ("loops", "fit_loop", "epoch_loop.batch_progress")
OURS = "dfc_lightning"
GARBAGE: dict[str, tuple[Any, str]] = {
    "a version of no kind": (at("pytorch-lightning_version", value=None), "pytorch-lightning_version"),
    "a version that is none": (at("pytorch-lightning_version", value="new"), "pytorch-lightning_version.*damaged"),
    "weights that are text": (at("state_dict", value="w"), "'state_dict'.*damaged"),
    "optimizers that are none": (at("optimizer_states", value=None), "'optimizer_states'"),
    "an optimizer of text": (at("optimizer_states", value=["text"]), "'optimizer_states'"),
    "an optimizer without groups": (at(*OPTIMIZER, value={"state": {}}), "'optimizer_states'.*param_groups"),
    "an optimizer of another kind": (
        at(*OPTIMIZER, "param_groups", 0, value={"params": [0, 1, 2, 3, 4, 5], "lr": 0.1}),
        "'optimizer_states'",
    ),
    "a rate that is text": (at(*OPTIMIZER, "param_groups", 0, "lr", value="fast"), "lr='fast' is no number"),
    "moments of another shape": (
        at(*OPTIMIZER, "state", 0, "exp_avg", value=torch.zeros(2)),
        r"exp_avg has the shape \(2,\)",
    ),
    "schedulers of no kind": (at("lr_schedulers", value=3), "'lr_schedulers'"),
    "a scheduler of text": (at("lr_schedulers", value=["text"]), "'lr_schedulers'"),
    "a scheduler that never stepped": (at("lr_schedulers", 0, "last_epoch", value="x"), "last_epoch='x' is no count"),
    "loops of no kind": (at("loops", value=[1]), "'loops'"),
    "loops without a fit": (at("loops", value={}), "'loops'.*fit_loop"),
    "progress of text": (at(*LOOP, value="text"), "'loops'.*batch_progress"),
    "progress without a total": (at(*LOOP, value={"current": {}}), "'loops'.*total"),
    "a negative count": (at(*LOOP, "total", "ready", value=-3), "ready=-3 is no count"),
    "a fraction of a batch": (at(*LOOP, "current", "completed", value=1.5), r"completed=1\.5 is no count"),
    "callbacks of no kind": (at("callbacks", value=[1]), "'callbacks'"),
    "a callback without its entries": (at("callbacks", "Kept", value={"other": 1}), "'callbacks, Kept'.*count"),
    "a callback of text": (at("callbacks", "Kept", value="text"), "'callbacks, Kept'"),
    "Q of NaN": (at(OURS, "feedback", "net.2", value=torch.full((8, 3), torch.nan)), r"'net\.2' is not finite: 24 of"),
    "Q of one inf": (
        at(OURS, "feedback", "net.0", value=torch.tensor([[torch.inf, 0, 0]] + 11 * [[0.0, 0, 0]])),
        r"'net\.0' is not finite: 1 of its 36",
    ),
    "Q of integers": (
        at(OURS, "feedback", "net.2", value=torch.ones(8, 3, dtype=torch.int64)),
        "int64, not of floating",
    ),
    "Q of truth": (at(OURS, "feedback", "net.2", value=torch.ones(8, 3, dtype=torch.bool)), "bool, not of floating"),
    "Q of lists": (at(OURS, "feedback", "net.2", value=[[1.0]]), "list, not of floating"),
    "Q's moments of NaN": (
        at(OURS, "learner", "optimizer", "state", 0, "exp_avg", value=torch.full((12, 3), torch.nan)),
        "exp_avg of feedback weight 0 is not finite",
    ),
    "steps below zero": (at(OURS, "learner", "steps", value=-1), "steps=-1 is no count"),
    "a seed of text": (at(OURS, "seed", value="1"), "seed='1' is no count"),
    "an epoch below none": (at(OURS, "stages", "epoch", value=-2), "epoch=-2 is no count.*from -1"),
    "passes below zero": (at(OURS, "stages", "passes", value=-1), "passes=-1 is no count"),
    "half a batch": (at(OURS, "stages", "batches", value=0.5), r"batches=0\.5 is no count"),
    "passes that are true": (at(OURS, "stages", "total_passes", value=True), "total_passes=True is no count"),
    "a count for a truth": (at(OURS, "stages", "initial_done", value=1), "initial_done=1 must be true or false"),
}


class Kept(Callback):
    """Has a state of its own."""

    count = 0

    @property
    def state_key(self) -> str:
        return "Kept"

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"] + 0 * len(state["count"] * [0])


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("full") / "full.ckpt"
    trainer = quiet(strategy(), max_epochs=1, callbacks=[Kept()])
    trainer.fit(Innocent(), loader())
    trainer.save_checkpoint(path)
    return path


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_named_before_anything_is_trained(name, full, tmp_path):
    write, message = GARBAGE[name]
    path = tmp_path / "garbage.ckpt"
    write(path, torch.load(full, weights_only=True))
    module = Innocent()
    with pytest.raises(ControlError, match=message):
        quiet(strategy(), max_epochs=3, callbacks=[Kept()]).fit(module, loader(), ckpt_path=path)
    assert module.calls == 0 and not differing(dict(module.state_dict()), dict(Innocent().state_dict()))


def test_a_whole_checkpoint_with_callbacks_is_loaded(full):
    kept = Kept()
    kept.count = 5
    trainer = quiet(strategy(), max_epochs=2, callbacks=[kept])
    trainer.fit(Innocent(), loader(), ckpt_path=full)
    assert kept.count == 0 and trainer.current_epoch == 2


# Where they come from, and what they would run


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.mark,)


@pytest.fixture
def served(tmp_path):
    """A folder and the address it is served at."""

    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    folder = tmp_path / "served"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


ASKED: dict[str, Callable[[L.Trainer, Any, Any], Any]] = {
    "fit": lambda trainer, module, path: trainer.fit(module, loader(), ckpt_path=path),
    "validate": lambda trainer, module, path: trainer.validate(module, loader(), ckpt_path=path, verbose=False),
}


@pytest.mark.parametrize("remote", [False, True], ids=["a file", "a URL"])
@pytest.mark.parametrize("asked", ASKED)
def test_no_checkpoint_runs_code(asked, remote, good, served, tmp_path):
    folder, address = served
    state = torch.load(good, weights_only=True)
    torch.save({**state, "hyper_parameters": {"lr": Bomb(tmp_path / "ran")}}, folder / "bomb.ckpt")
    path = f"{address}/bomb.ckpt" if remote else folder / "bomb.ckpt"
    with pytest.raises(ControlError, match="could run code.*weights_only=False"):
        ASKED[asked](quiet(strategy(), max_epochs=3), Innocent(), path)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_is_resumed_by_its_address(good, served):
    folder, address = served
    (folder / "good.ckpt").write_bytes(good.read_bytes())
    s = strategy()
    quiet(s, max_epochs=3).fit(Innocent(), loader(), ckpt_path=f"{address}/good.ckpt")
    assert not differing(holdings(s), holdings_of(good))
    (folder / "torn.ckpt").write_bytes(good.read_bytes()[:1000])
    with pytest.raises(ControlError, match=UNREADABLE):
        quiet(strategy()).fit(Innocent(), loader(), ckpt_path=f"{address}/torn.ckpt")


# Full disks


def full_disk(after: int) -> Callable[[int], None]:
    def fsync(descriptor: int) -> None:
        os.ftruncate(descriptor, after)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return fsync


def test_a_full_disk_leaves_the_checkpoint_that_was_there(good, tmp_path, monkeypatch):
    path, elsewhere = tmp_path / "last.ckpt", tmp_path / "elsewhere"
    elsewhere.mkdir()
    path.write_bytes(good.read_bytes())
    trainer = quiet(strategy(), max_epochs=2)
    trainer.fit(Innocent(), loader())
    monkeypatch.setenv("TMPDIR", str(elsewhere))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(os, "fsync", full_disk(500))
    with pytest.raises(ControlError, match="could not be written: No space left.*as it was"):
        trainer.save_checkpoint(path)
    assert path.read_bytes() == good.read_bytes() and sorted(p.name for p in tmp_path.iterdir()) == [
        "elsewhere",
        "last.ckpt",
    ]


def test_a_checkpoint_is_on_the_disk_beside_its_place_before_it_has_its_name(tmp_path, monkeypatch):
    events: list[tuple[str, ...]] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(("fsync",)) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: events.append((str(Path(a).parent), str(b))) or replace(a, b))
    trainer = quiet(strategy(), max_epochs=1)
    trainer.fit(Innocent(), loader())
    trainer.save_checkpoint(tmp_path / "new" / "last.ckpt")
    assert events == [("fsync",), (str(tmp_path / "new"), str(tmp_path / "new" / "last.ckpt"))]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["last.ckpt"]
