"""Several processes give what one gives on the joint batch."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from cases.fits import clusters, differing, quiet, saver
from cases.paths import TESTS
from cases.processes import (
    CASES,
    SKIP,
    Dealt,
    Witnessed,
    digest,
    distance,
    fit,
    free_port,
    learned,
    on_all,
    spawn,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader, DistributedSampler

from dfc_lightning import DFC, ControlError, DFCDDPStrategy, DFCStrategy, FeedbackLearning
from dfc_lightning import Sampled as SampledFeedback

pytestmark = pytest.mark.processes

# Equal to one process


def all_cases(rank: int, processes: int, folder: str) -> None:
    for name, case in CASES.items():
        trainer, module = fit(case, processes)
        assert len(set(on_all(digest(learned(trainer, module))))) == 1, f"{name}: ranks differ"
        logged = on_all(len(trainer.logger.rows))
        assert logged[0] > 0 and not any(logged[1:]), f"{name}: {logged} rows logged"
        if "ddp" in case:
            assert module.buckets > 2
        if rank == 0:
            torch.save({**learned(trainer, module), "logged": trainer.logger.rows}, Path(folder, f"{name}.pt"))


@pytest.fixture(scope="module", params=[2, 4])
def several(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"{request.param}")
    spawn(all_cases, request.param, folder)
    return request.param, folder


@pytest.mark.parametrize("name", CASES)
def test_several_processes_equal_one_on_the_joint_batch(name, several):
    processes, folder = several
    theirs = torch.load(folder / f"{name}.pt")
    trainer, module = fit(CASES[name], 1, joint=processes)
    apart = distance({**learned(trainer, module), "logged": trainer.logger.rows}, theirs)
    if "outputs" in CASES[name]:  # beyond OWN_UP_TO, solves begin with a mean over the process's own batch
        apart = {at: d for at, d in apart.items() if not at.endswith(("iterations", "residual"))}
    worst = max(apart, key=apart.get)
    print(f"{processes} processes, {name}: {apart[worst]:.1e} at {worst}")
    assert apart[worst] <= (1e-10 if CASES[name]["precision"] == "64-true" else 1e-5), worst
    names = {name for _, row in trainer.logger.rows for name in row}
    assert names >= {"train/loss_step", "train/loss_epoch", "val/loss", "val/accuracy"}
    assert names >= {"settling/residual", "settling/iterations"} or not isinstance(trainer.strategy.rule, DFC)
    assert names >= {"feedback/norm", "feedback/grad_norm"} or trainer.strategy.learner is None


# In step


def odds(rank: int, processes: int, folder: str) -> None:
    for name in ("sampled feedback", "dfa"):  # no seed anywhere: the first process's
        torch.manual_seed(1000 + rank)
        assert len(set(on_all(digest(learned(*fit(CASES[name], processes, seed=None)))))) == 1

    def skip_third(call: int) -> Any:
        return SKIP if call == 2 else None

    module = Witnessed()
    module.at_call = skip_third
    with pytest.raises(ControlError, match="no batch can be skipped"):
        fit(CASES["plain trainer"], processes, module=module)

    straight = learned(*fit(CASES["plain trainer"], processes))
    for told in (tell_one, tell_all):  # within the second pass
        module = Witnessed()
        module.at_call = functools.partial(told, module)
        with pytest.raises(SIGTERMException):
            fit(CASES["plain trainer"], processes, module=module, callbacks=[saver(folder)], enable_checkpointing=True)
        assert on_all(len(module.seen)) == [8, 8]
        resumed = learned(*fit(CASES["plain trainer"], processes, ckpt_path=Path(folder, "interrupted.ckpt")))
        assert not differing(resumed, straight)


def killed(rank: int, processes: int, folder: str) -> None:
    """SIGTERM to one process alone, in a feedback pass, in an epoch, and in a validation that comes first."""
    straight = learned(*fit(CASES["plain trainer"], processes))
    for told, call, seen in ((0, 7, 8), (1, 7, 8), (0, 12, 13), (1, 12, 13), (1, -1, 0)):
        module = Witnessed() if call >= 0 else TerminatedInValidation()
        module.at_call = functools.partial(kill, told, call, module)
        started, sanity = time.monotonic(), {"num_sanity_val_steps": 1} if call < 0 else {}
        keep = saver(Path(folder, f"{told} {call}"))
        with pytest.raises(SIGTERMException):
            fit(CASES["plain trainer"], processes, module=module, callbacks=[keep], enable_checkpointing=True, **sanity)
        assert time.monotonic() - started < 20
        assert on_all(len(module.seen)) == [seen, seen]
        path = Path(folder, f"{told} {call}", "interrupted.ckpt")
        assert not differing(learned(*fit(CASES["plain trainer"], processes, ckpt_path=path)), straight)


def kill(rank: int, at: int, module: Witnessed, call: int) -> None:
    if call == at and module.global_rank == rank:
        os.kill(os.getpid(), signal.SIGTERM)


class TerminatedInValidation(Witnessed):
    """One process is told to terminate before anything is trained."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if self.global_rank == 1 and not self.seen:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_to_one_process_alone_ends_all_at_the_same_batch(tmp_path):
    spawn(killed, 2, tmp_path)


def tell_one(module: Witnessed, call: int) -> None:
    if call == 7 and module.global_rank == 1:
        module.trainer._signal_connector.received_sigterm = True


def tell_all(module: Witnessed, call: int) -> None:
    if call == 7:
        os.kill(os.getpid(), signal.SIGTERM)


def test_ranks_start_stop_and_resume_together(tmp_path):
    spawn(odds, 2, tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_each_feedback_pass_has_an_order_of_its_own_and_the_users_sampler_is_not_touched(workers):
    class Told(DistributedSampler):
        def set_epoch(self, epoch: int) -> None:
            super().set_epoch(epoch)
            if not hasattr(self, "epochs"):
                self.epochs = []
            self.epochs.append(epoch)

    data, module = clusters(), Witnessed()
    sampler = Told(data, 1, 0)
    learning = FeedbackLearning(method=SampledFeedback(steps=4), initial_passes=2, passes_per_epoch=2)
    trainer = quiet(DFCStrategy(DFC(), seed=3, feedback=learning))
    trainer.fit(module, DataLoader(data, len(data) // 2, sampler=sampler, num_workers=workers))
    passes = [tuple(a + b) for a, b in zip(module.seen[::2], module.seen[1::2])]
    forward = [passes.pop(4), passes.pop(6)]
    assert len(passes) == 6 and len(set(passes)) == 6 and len(set(forward)) == 2
    assert all(sorted(p) == sorted(passes[0]) for p in passes)
    assert sampler.epochs == [0, 1] and sampler.epoch == 1


# Launchers


def script(strategy: str, nodes: str, devices: str, folder: str) -> None:
    """What a user's script does; started by torchrun, by Lightning, or plainly."""
    torch.set_num_threads(1)
    L.seed_everything(3, verbose=False)
    learning = FeedbackLearning(method=SampledFeedback(steps=4))
    chosen = {"dfc": DFCStrategy, "dfc_ddp": DFCDDPStrategy}[strategy](DFC(), feedback=learning)
    devices_and_nodes = {"devices": int(devices), "num_nodes": int(nodes)}
    trainer = quiet(chosen, **devices_and_nodes, max_epochs=1, precision="64-true", use_distributed_sampler=False)
    data = Dealt(clusters(64, dtype=torch.float64), False, False, None)
    module = Witnessed()
    trainer.fit(module, data)
    if trainer.is_global_zero:
        torch.save({"processes": trainer.world_size, **learned(trainer, module)}, Path(folder, "learned.pt"))


def note(moment: str, folder: str) -> None:
    Path(folder, f"{moment} of {os.getpid()}").write_text(str(dist.is_initialized()))


MAIN = """import atexit, sys
sys.path[:0] = {here!r}
import test_processes as t
atexit.register(t.note, "exit", sys.argv[-1])
t.script(*sys.argv[1:])
atexit.register(t.note, "end", sys.argv[-1])
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    script("dfc", "1", "1", str(folder))
    return torch.load(folder / "learned.pt")


@pytest.mark.parametrize("launcher", ["two nodes by torchrun", "Lightning"])
def test_started_by(launcher, alone, tmp_path):
    main = tmp_path / "main.py"
    main.write_text(MAIN.format(here=[str(TESTS), str(Path(__file__).parent)]))
    if launcher == "Lightning":
        commands = [[sys.executable, main, "dfc_ddp", "1", "2", tmp_path]]
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
        torchrun += ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
        commands = [[*torchrun, f"--node_rank={node}", main, "dfc_ddp", "2", "1", tmp_path] for node in range(2)]
    reports = [tmp_path / f"{node}.txt" for node in range(len(commands))]
    nodes = [subprocess.Popen(list(map(str, c)), stderr=report.open("w")) for c, report in zip(commands, reports)]
    try:
        codes = [node.wait(timeout=120) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert codes == [0] * len(nodes), [report.read_text() for report in reports]
    for moment, grouped in (("end", "True"), ("exit", "False")):  # gloo's threads may abort a process that exits
        assert [found.read_text() for found in tmp_path.glob(f"{moment} of *")] == [grouped] * 2
    theirs = torch.load(tmp_path / "learned.pt")
    assert theirs.pop("processes") == 2
    apart = distance({k: v for k, v in alone.items() if k != "processes"}, theirs)
    assert max(apart.values()) <= 1e-10


def test_started_by_spawn(tmp_path):
    """The weights come back to the process that started the others; Q is in the checkpoint."""
    assert quiet("dfc_ddp_spawn", devices=2).strategy._start_method == "spawn"
    learning = FeedbackLearning(method=SampledFeedback(steps=4))
    settings = {"enable_checkpointing": True, "use_distributed_sampler": False}
    modules, saved = [], []
    for processes in (1, 2):
        s: Any = DFCStrategy(DFC(), feedback=learning, seed=3)
        if processes == 2:
            s = DFCDDPStrategy(DFC(), feedback=learning, seed=3, start_method="spawn")
        keep = ModelCheckpoint(tmp_path / str(processes), "last")
        trainer = quiet(s, devices=processes, max_epochs=1, callbacks=[keep], **settings)
        modules.append(Witnessed())
        trainer.fit(modules[-1], Dealt(clusters(64), False, False, None))
        saved.append(torch.load(tmp_path / str(processes) / "last.ckpt", weights_only=True)["dfc_lightning"])
    assert max(distance(dict(modules[0].net.state_dict()), dict(modules[1].net.state_dict())).values()) < 1e-5
    assert max(distance(saved[0], saved[1]).values()) < 1e-5
