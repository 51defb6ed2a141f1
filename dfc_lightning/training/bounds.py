"""How long feedback passes may last: no longer than what the trainer is going to do."""

from __future__ import annotations

import time

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Timer

from dfc_lightning.feedback_learning.learner import FeedbackLearning

STREAM_BATCHES = 500
"""Batches of a feedback pass over data without length, unless ``FeedbackLearning(max_batches=…)`` says otherwise."""

SHARE_OF_TIME = 0.5
"""Of the time that the trainer has left, what the passes before a training batch may take."""


def batches_in_pass(trainer: pl.Trainer, learning: FeedbackLearning) -> int:
    """How many of the epoch's batches a pass takes."""
    bounds = [trainer.num_training_batches]
    if learning.max_batches is not None:
        bounds.append(learning.max_batches)
    elif bounds[0] == float("inf"):
        bounds.append(STREAM_BATCHES)
    return int(min(bounds))


def batches_left(trainer: pl.Trainer) -> int | float:
    """How many batches ``max_steps`` leaves for training."""
    if trainer.max_steps < 0:
        return float("inf")
    return max(0, trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches


class Deadline:
    """When passes must end for the sake of ``max_time``, or because the trainer was told to stop in one.

    Args:
        trainer: the trainer; its ``Timer`` callbacks are asked, of which ``max_time`` makes one.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
        left = [timer.time_remaining() for timer in timers]
        self._until = time.monotonic() + SHARE_OF_TIME * min((t for t in left if t is not None), default=float("inf"))
        self._trainer, self._stopping = trainer, trainer.should_stop

    def over(self) -> bool:
        """Whether it has come."""
        return time.monotonic() >= self._until or (self._trainer.should_stop and not self._stopping)
