"""The loss of a batch, made beside training: to learn feedback by, and to find what it wants of the output."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from dfc_lightning.network.controlled_network import ControlledNetwork
from dfc_lightning.network.gate import LossReduction
from dfc_lightning.network.judging import found_loss
from dfc_lightning.training.loop import step_arguments


class BatchSkipped(Exception):
    """The module's ``training_step`` returned None, by which Lightning skips a batch."""


def loss_of(output: Any) -> Any:
    """The loss in what a ``training_step`` has returned."""
    return output.get("loss") if isinstance(output, Mapping) else output


def loss_beside(trainer: pl.Trainer, batch: Any, batch_idx: int) -> Any:
    """The loss of the module's ``training_step``.

    Raises:
        BatchSkipped: there is none.
    """
    output = trainer.lightning_module.training_step(*step_arguments(trainer, batch, batch_idx))
    if output is None:
        raise BatchSkipped
    return loss_of(output)


def find_loss(
    network: ControlledNetwork, trainer: pl.Trainer, batch: Any, batch_idx: int, loss_reduction: LossReduction
) -> None:
    """Find what the loss wants of the output, ``network.loss``."""

    def run() -> Any:
        with isolate_rng():  # the same draws at each call, and in training after them
            return loss_beside(trainer, copy.deepcopy(batch), batch_idx)

    network.loss = found_loss(network, run, loss_reduction)
    rank_zero_info(f"By its gradient, the loss is {network.loss}: the labels that this tells are the targets.")
