"""Runs that were broken off under commit 07a6230, and the first update when that commit resumed them.

``python -m cases.saved_runs FOLDER`` writes such files, of the package that is on the path.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from cases.fits import LEARNING, loader, quiet, saver, strategy
from dfc_lightning import Expected, FeedbackLearning

FOLDER = Path(__file__).parent / "checkpoints_0_1"
BOTH_WAYS = FeedbackLearning(Expected(steps=8), initial_passes=1, passes_per_epoch=1, every_n_batches=1)
NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)),
    "convolutional": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 4, 2, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 1),
        nn.GroupNorm(2, 6),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 3),
    ),
}
LEARNINGS = {"mlp": LEARNING, "convolutional": BOTH_WAYS}
BROKEN_OFF: dict[str, int] = {
    "mlp": 3 * 5 + 2,  # the call of training_step, in the second epoch's feedback pass
    "convolutional": 4 * 5 + 3,  # in the second epoch
}


class BrokenOff(Exception):
    """Ends a run."""


class Taught(L.LightningModule):
    """A small network and an optimizer whose steps are in proportion to what it is given."""

    def __init__(self, net: nn.Module, last: int | None = None) -> None:
        super().__init__()
        self.net, self.last, self.calls = net, last, 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.calls == self.last:
            raise BrokenOff
        self.calls += 1
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


class FirstUpdate(Callback):
    """Notes what has been learned where training goes on, and what the first step then makes of it."""

    def __init__(self) -> None:
        self.moments: list[dict[str, Any]] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.moments.append(holdings(trainer, module))

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.moments.append(holdings(trainer, module))
        trainer.should_stop = True


def holdings(trainer: Any, module: Taught) -> dict[str, Any]:
    """A copy of what a run has learned."""
    s = trainer.strategy
    held = {
        "weights": module.net.state_dict(),
        "feedback": s.network.state_dict(),
        "optimizer": s.optimizers[0].state_dict()["state"],
        "learner": s.learner.state_dict(),
        "stages": s.stages.progress.state_dict(),
        "steps": trainer.global_step,
    }
    return copy.deepcopy(held)


def module_of(name: str, last: int | None = None) -> Taught:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return Taught(NETS[name](), last)


def resumed(name: str, folder: Path) -> list[dict[str, Any]]:
    """What a run holds where it goes on, and after its first update."""
    first = FirstUpdate()
    trainer = quiet(strategy(feedback=LEARNINGS[name]), max_epochs=3, callbacks=[first])
    trainer.fit(module_of(name), loader(), ckpt_path=folder / f"{name}.ckpt")
    return first.moments


def write(folder: Path) -> None:
    for name, call in BROKEN_OFF.items():
        keep = saver(folder)
        trainer = quiet(strategy(feedback=LEARNINGS[name]), max_epochs=3, callbacks=[keep], enable_checkpointing=True)
        try:
            trainer.fit(module_of(name, call), loader())
        except BrokenOff:
            (folder / "interrupted.ckpt").rename(folder / f"{name}.ckpt")
        torch.save(resumed(name, folder), folder / f"{name}_resumed.pt")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
