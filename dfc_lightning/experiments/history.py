from __future__ import annotations

import csv
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, RandomSampler
from torchmetrics import MeanMetric, Metric


class HistoryFile(Callback):
    """Keeps every epoch's figures, those of the test set among them, in checkpoints and in ``metrics.csv``.

    Training does not notice: the test set passes through ``test_step`` with the generators left as they were.

    Args:
        folder: where ``metrics.csv`` goes.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.epochs: list[dict[str, float]] = []
        self._since = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the epoch's figures, before the checkpoint is written."""
        figures = {name: float(value) for name, value in trainer.callback_metrics.items() if "/" in name}
        figures |= test_figures(trainer, pl_module)
        now = time.perf_counter()
        self.epochs.append({"epoch": trainer.current_epoch, **figures, "seconds": now - self._since})
        self._since = now
        if trainer.is_global_zero:
            self._write()

    def series(self) -> dict[str, list[float]]:
        """Every figure's values by epoch."""
        names = dict.fromkeys(name for epoch in self.epochs for name in epoch if name != "epoch")
        return {name: [epoch.get(name, float("nan")) for epoch in self.epochs] for name in names}

    def state_dict(self) -> dict[str, Any]:
        """The epochs so far."""
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from them."""
        self.epochs = list(state_dict["epochs"])

    def _write(self) -> None:
        part = self.folder / "metrics.csv.part"
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for epoch in self.epochs for name in epoch)))
            writer.writeheader()
            writer.writerows(self.epochs)
        os.replace(part, self.folder / "metrics.csv")


class EpochOrder(Callback):
    """Makes the order of a shuffled epoch depend on the seed and the epoch alone, so that a resumed run keeps it.

    Args:
        seed: the run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Seed the sampler, which draws its order when asked for the first batch."""
        loader = trainer.train_dataloader
        if isinstance(loader, DataLoader) and isinstance(loader.sampler, RandomSampler):
            mixed = (self.seed * 0x9E3779B97F4A7C15 + trainer.current_epoch * 0xBF58476D1CE4E5B9) % 2**63
            loader.sampler.generator = torch.Generator().manual_seed(mixed)


def test_figures(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]:
    """What the module's ``test_step`` logs of the trainer's test set, as means over the samples.

    Args:
        trainer: a trainer in fit, with a data module.
        module: the module it trains.
    """
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    plugin, training = trainer.precision_plugin, module.training
    with isolate_rng(), torch.no_grad(), plugin.test_step_context(), _recorded(module) as logged:
        datamodule.setup("test")
        module.eval()
        for index, batch in enumerate(datamodule.test_dataloader()):
            module.test_step(trainer.strategy.batch_to_device(plugin.convert_input(batch)), index)
        figures = {name: float(metric.compute()) for name, metric in logged.items()}
        for metric in logged.values():
            metric.reset()
    module.train(training)
    return figures


@contextmanager
def _recorded(module: pl.LightningModule) -> Iterator[dict[str, Metric]]:
    """Gather what the module logs: its own metrics, and weighted means of plain values."""
    logged: dict[str, Metric] = {}

    def log(name: str, value: Any, *args: Any, batch_size: int = 1, **kwargs: Any) -> None:
        if isinstance(value, Metric):
            logged[name] = value
            return
        value = torch.as_tensor(value).detach()
        mean = logged.setdefault(name, MeanMetric(nan_strategy="disable").set_dtype(torch.float64).to(value.device))
        mean.update(value.double(), batch_size)

    module.__dict__["log"] = log
    try:
        yield logged
    finally:
        del module.__dict__["log"]
