"""What the monitors ask of a trainer."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch import Callback

from dfc_lightning.errors import ControlError
from dfc_lightning.training.controlled import ControlledTraining


def controlled(trainer: pl.Trainer, callback: Callback) -> ControlledTraining:
    """The trainer's strategy.

    Raises:
        ControlError: it is not one of feedback control.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, ControlledTraining):
        raise ControlError(
            f"{type(callback).__name__} looks at the lessons of a feedback-control strategy, but the trainer has "
            f"{type(strategy).__name__}. Give Trainer(strategy=DFCStrategy()), with rule=Backprop() to look at "
            "backprop, or leave the callback out."
        )
    return strategy
