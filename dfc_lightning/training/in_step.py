"""Processes that stop at the same batch, whichever of them is told to."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from dfc_lightning.training.loop import leave_by_sigterm, note_sigterm


class InStep(Strategy):
    """A strategy whose processes ask each other before they leave."""

    _trainer: pl.Trainer | None = None
    _told = False
    """Whether this process, of several, was told to terminate."""

    def _on_any(self, conditions: Sequence[bool]) -> list[bool]:
        """Which of them hold in any process; asked in step, so that all do the same, and leave together if told to."""
        trainer = self._trainer
        assert trainer is not None
        told = [self._told or trainer.received_sigterm, *conditions]
        if trainer.world_size > 1:
            asked = torch.tensor(told, dtype=torch.float, device=self.root_device)
            told = [bool(answer) for answer in self.reduce(asked, reduce_op="max")]
        if told[0]:
            leave_by_sigterm(trainer)
        return told[1:]

    def _watch_for_sigterm(self) -> None:
        def note() -> None:
            self._told = True

        if self._trainer is not None and self._trainer.world_size > 1:
            note_sigterm(self._trainer, note)

    @override
    def on_validation_start(self) -> None:
        super().on_validation_start()
        if self.lightning_module is not None and self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            self._watch_for_sigterm()  # a sanity check comes before training starts

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        if self._trainer is not None and self._trainer.world_size > 1:
            self._on_any([])
