"""What the strategies and the monitors send to the trainer's loggers, and when."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import Tensor

from dfc_lightning.settling.settled import DIVERGED_BEYOND, Settled


def logs_at(trainer: pl.Trainer, step: int) -> bool:
    """Whether the trainer's ``log_every_n_steps`` falls on this step, counted from 0."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and (step + 1) % every == 0


def log(trainer: pl.Trainer, metrics: Mapping[str, Tensor | float], step: int, own_step: int | None = None) -> None:
    """Send metrics to all loggers at ``step``, or at ``own_step`` if one is given and a logger has an axis for it."""
    values = {name: float(value) for name, value in metrics.items()}
    for logger in trainer.loggers:
        in_table = isinstance(logger, (CSVLogger, WandbLogger))  # with one column of steps, which is training's
        logger.log_metrics(values, step if own_step is None or in_table else own_step)


def settling_metrics(settled: Settled, reduce: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Over the samples of all processes: fraction converged, mean residual, iterations.

    Args:
        settled: the settled states of this process.
        reduce: mean over the processes, or with ``reduce_op="max"`` the largest.
    """
    residual = settled.residual.double().clamp_max(DIVERGED_BEYOND)
    iterations = settled.residual.new_tensor(settled.iterations, dtype=torch.float64)
    return {
        "settling/converged": reduce(settled.converged.double().mean()),
        "settling/residual": reduce(residual.nan_to_num(DIVERGED_BEYOND).mean()),
        "settling/iterations": reduce(iterations, reduce_op="max"),  # of a batch, as of its last sample
    }
