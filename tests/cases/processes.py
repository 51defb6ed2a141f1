"""Fits in several processes, and in one on the same data, that can be compared."""

from __future__ import annotations

import hashlib
import io
import os
import socket
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler
from torchmetrics.classification import MulticlassAccuracy

from cases.fits import Outside, clusters, quiet
from dfc_lightning import DFA, DFC, DFCDDPStrategy, DFCStrategy, Expected, FeedbackLearning, MinimumNorm
from dfc_lightning import Sampled as SampledFeedback
from dfc_lightning.settling import Euler, Linearized

JOINT = 16
SKIP = object()
EVERYTHING = FeedbackLearning(method=Expected(steps=8), initial_passes=1, passes_per_epoch=1, every_n_batches=2)
SAMPLED = FeedbackLearning(method=SampledFeedback(steps=6), initial_passes=2, passes_per_epoch=1, every_n_batches=3)
DOUBLE: dict[str, Any] = {"precision": "64-true", "trainer": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}}
TINY_BUCKETS = {"bucket_cap_mb": 0.0001}

CASES: dict[str, dict[str, Any]] = {
    "expected feedback": {**DOUBLE, "feedback": EVERYTHING},
    "sampled feedback": {**DOUBLE, "feedback": SAMPLED, "ddp": TINY_BUCKETS},
    "plain trainer": {"precision": "64-true", "feedback": EVERYTHING, "shuffle": True},
    "linearised": {**DOUBLE, "rule": DFC(settling=Linearized()), "feedback": SAMPLED},
    "simulated": {**DOUBLE, "rule": DFC(settling=Euler(steps=60), integrate=True), "feedback": SAMPLED},
    "dfa": {**DOUBLE, "rule": DFA(), "ddp": TINY_BUCKETS},
    "minimum norm": {**DOUBLE, "rule": MinimumNorm()},
    "feedback from jacobians": {**DOUBLE, "feedback_init": "jacobian", "feedback": EVERYTHING},
    "wide outputs": {**DOUBLE, "outputs": 9, "feedback": SAMPLED},
    "outputs wider than the layer before": {**DOUBLE, "outputs": 70, "feedback": EVERYTHING},
    "uneven": {"precision": "64-true", "feedback": EVERYTHING, "size": 61, "lightnings_sampler": True},
    "wide outputs in float32": {"precision": "32-true", "outputs": 9, "feedback": EVERYTHING},
    "expected in float32": {**DOUBLE, "precision": "32-true", "feedback": EVERYTHING},
    "sampled in float32": {"precision": "32-true", "feedback": SAMPLED, "shuffle": True, "ddp": TINY_BUCKETS},
}


def nothing(call: int) -> None:
    pass


class Witnessed(L.LightningModule):
    """Logs what it can."""

    seen = Outside()

    def __init__(self, outputs: int = 3, unequal: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(int(os.environ.get("RANK", 0)) if unequal else 0)
            self.net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, outputs))
        self.accuracy = MulticlassAccuracy(outputs)
        self.at_call: Any = nothing
        self.seen = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.at_call(len(self.seen)) is SKIP:
            return None
        self.seen.append(batch[0][:, 0].tolist())
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train/loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.net(batch[0])
        self.accuracy(logits, batch[1])
        self.log("val/accuracy", self.accuracy)
        self.log("val/loss", F.cross_entropy(logits, batch[1]), sync_dist=True)

    def on_train_end(self) -> None:
        if isinstance(self.trainer.model, nn.parallel.DistributedDataParallel):
            self.buckets = len(self.trainer.model._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(","))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), 0.01)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}


class Joint(Sampler):
    """What ``processes`` distributed samplers deal out, with what they repeat to make it even, in one."""

    def __init__(self, data: Any, processes: int, shuffle: bool) -> None:
        self.dealt = [DistributedSampler(data, processes, rank, shuffle) for rank in range(processes)]

    def __len__(self) -> int:
        return sum(map(len, self.dealt))

    def __iter__(self) -> Any:
        return (index for indices in zip(*self.dealt) for index in indices)

    def set_epoch(self, epoch: int) -> None:
        for sampler in self.dealt:
            sampler.set_epoch(epoch)


class Dealt(L.LightningDataModule):
    """Deals a joint batch out to the ranks, sample by sample; or leaves that to Lightning."""

    def __init__(self, data: Dataset, shuffle: bool, lightnings_sampler: bool, joint: int | None) -> None:
        super().__init__()
        self.data, self.shuffle, self.lightnings_sampler, self.joint = data, shuffle, lightnings_sampler, joint

    def loader(self, data: Any, shuffle: bool) -> DataLoader:
        n = self.trainer.world_size
        sampler: Any = (
            None if self.lightnings_sampler else DistributedSampler(data, n, self.trainer.global_rank, shuffle)
        )
        return DataLoader(data, JOINT // n, sampler=Joint(data, self.joint, shuffle) if self.joint else sampler)

    def train_dataloader(self) -> DataLoader:
        return self.loader(self.data, self.shuffle)

    def val_dataloader(self) -> DataLoader:
        return self.loader(clusters(32, 5, self.data[0][0].dtype), False)


class Rows(DummyLogger):
    """Keeps what is logged, on the first process."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[Any, dict[str, float]]] = []

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))


def fit(
    case: dict[str, Any],
    processes: int,
    joint: int | None = None,
    module: Any = None,
    seed: int | None = 3,
    ckpt_path: Any = None,
    **settings: Any,
) -> tuple[L.Trainer, Witnessed]:
    """Train a case on this many processes; ``joint``: as one, but on the data as dealt out to so many."""
    dtype = torch.float64 if case["precision"] == "64-true" else torch.float32
    data: Any = clusters(case.get("size", 5 * JOINT), dtype=dtype)
    lightnings = case.get("lightnings_sampler", False)
    rule_and_feedback = {k: case[k] for k in ("rule", "feedback", "feedback_init") if k in case}
    rule_and_feedback.setdefault("rule", DFC())
    chosen: Any = DFCStrategy(seed=seed, **rule_and_feedback)
    if processes > 1:
        chosen = DFCDDPStrategy(seed=seed, **rule_and_feedback, **case.get("ddp", {}))
    defaults = dict(max_epochs=2, devices=processes, precision=case["precision"], logger=Rows(), log_every_n_steps=1)
    trainer = quiet(chosen, **(defaults | {"use_distributed_sampler": lightnings} | case.get("trainer", {}) | settings))
    module = module or Witnessed(case.get("outputs", 3), unequal=processes > 1)  # DDP takes the first process's weights
    trainer.fit(module, Dealt(data, case.get("shuffle", lightnings), lightnings, joint), ckpt_path=ckpt_path)
    return trainer, module


def learned(trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
    s: Any = trainer.strategy
    return {
        "weights": dict(module.net.state_dict()),
        "feedback": s.network.state_dict(),
        "optimizer": s.optimizers[0].state_dict(),
        "learner": None if s.learner is None else s.learner.state_dict(),
        "stages": None if s.stages is None else s.stages.progress.state_dict(),
        "steps": (trainer.global_step, trainer.current_epoch),
    }


def digest(found: Any) -> str:
    buffer = io.BytesIO()
    torch.save(found, buffer)
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def distance(a: Any, b: Any, at: str = "") -> dict[str, float]:
    """Largest relative difference of tensors and numbers at every leaf of two nested containers."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), (at, a.keys() ^ b.keys())
        return {name: d for k in a for name, d in distance(a[k], b[k], f"{at}/{k}").items()}
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b), at
        return {name: d for k, (x, y) in enumerate(zip(a, b)) for name, d in distance(x, y, f"{at}/{k}").items()}
    if isinstance(a, (Tensor, float)):
        x, y = torch.as_tensor(a).double(), torch.as_tensor(b).double()
        assert bool(torch.isfinite(x).all()), at
        floor = 1.0 if at.endswith("residual") else 1e-3  # a residual is relative already
        assert x.shape == y.shape, at
        if x.numel() == 0:
            return {}
        return {at: float((x - y).abs().max() / x.abs().max().clamp_min(floor))}
    assert a == b, (at, a, b)
    return {}


def as_rank(rank: int, processes: int, port: int, work: Any, folder: str) -> None:
    """Be one of the processes that torchrun would have started."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", WORLD_SIZE=str(processes),
        LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test",
    )  # fmt: skip
    work(rank, processes, folder)
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def spawn(work: Any, processes: int, folder: Path) -> None:
    mp.get_context("forkserver").set_forkserver_preload(
        ["dfc_lightning", "torchmetrics.classification"]
    )  # once for all
    mp.start_processes(as_rank, (processes, free_port(), work, str(folder)), processes, start_method="forkserver")


def on_all(value: Any) -> list[Any]:
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def trained_on_two(fitted: Any, names: Iterable[str], folder: Path) -> Path:
    """Train each case by two processes, which have to agree, and keep what was learned in ``folder``.

    Args:
        fitted: trains the case of a name on so many processes; a function of a module.
        names: of the cases.
        folder: where.
    """
    spawn(partial(_train_all, fitted, list(names)), 2, folder)
    return folder


def _train_all(fitted: Any, names: Sequence[str], rank: int, processes: int, folder: str) -> None:
    for name in names:
        trainer, module = fitted(name, processes)
        assert len(set(on_all(digest(learned(trainer, module))))) == 1, f"{name}: ranks differ"
        if rank == 0:
            torch.save(learned(trainer, module), Path(folder, f"{name}.pt"))


def furthest(fitted: Any, name: str, folder: Path) -> tuple[str, float]:
    """What one process learns most differently of the joint batch, and by how much."""
    apart = distance(learned(*fitted(name, 1, joint=2)), torch.load(folder / f"{name}.pt"))
    worst = max(apart, key=apart.get)
    return worst, apart[worst]
