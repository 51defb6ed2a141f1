"""Which feedback stage runs when, and how far it has come."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from dfc_lightning.feedback_learning.learner import FeedbackLearning
from dfc_lightning.training.progress import stage_bar


@dataclass
class StageProgress:
    """Where feedback learning stands; saved with a checkpoint, so that a run resumes within a pass.

    Args:
        initial_done: whether the initial passes are complete.
        epoch: the last epoch whose own passes are complete.
        passes: complete passes of the stage under way.
        batches: complete batches of the pass under way.
        total_passes: complete passes of all stages.
    """

    initial_done: bool = False
    epoch: int = -1
    passes: int = 0
    batches: int = 0
    total_passes: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name, value in state.items():
            setattr(self, name, value)


class FeedbackStages:
    """Runs the passes that are due before an epoch's first training batch.

    Args:
        learning: how many passes.
        learn: one feedback learning step on a batch, given also its index and whether the pass is an initial one.
        seed: the order of the data in pass k depends on this and k alone.
        terminated: whether to stop here, in all processes alike.
    """

    def __init__(
        self,
        learning: FeedbackLearning,
        learn: Callable[[Any, int, bool], dict[str, Tensor]],
        seed: int,
        terminated: Callable[[], bool],
    ) -> None:
        self.learning, self.learn, self.seed, self.terminated = learning, learn, seed, terminated
        self.progress = StageProgress()

    def run(self, trainer: pl.Trainer, batches: Callable[[int], Iterable[Any]], log: Callable[..., None]) -> None:
        """Run or finish what is due.

        Args:
            trainer: the trainer, in fit, with an epoch begun.
            batches: makes a new pass over the training batches, given how many there were before.
            log: takes the metrics of a step.
        """
        progress = self.progress
        if not progress.initial_done:
            self._stage(trainer, "initial feedback pass", self.learning.initial_passes, True, batches, log)
            progress.initial_done = True
        if progress.epoch < trainer.current_epoch:
            self._stage(trainer, "feedback pass", self.learning.passes_per_epoch, False, batches, log)
            progress.epoch = trainer.current_epoch

    def _stage(
        self,
        trainer: pl.Trainer,
        title: str,
        passes: int,
        initial: bool,
        batches: Callable[[int], Iterable[Any]],
        log: Callable[..., None],
    ) -> None:
        progress = self.progress
        while progress.passes < passes:
            label = f"{title} {progress.passes + 1}/{passes}"
            limit = trainer.num_training_batches
            with self._own_randomness(), stage_bar(trainer, label, limit, progress.batches) as advance:
                for index, batch in enumerate(batches(progress.total_passes)):
                    if index >= limit:
                        break
                    if index < progress.batches:
                        continue  # done before the interruption
                    with self._own_randomness(index + 1):
                        metrics = self.learn(batch, index, initial)
                    log(metrics)
                    progress.batches += 1
                    advance()
                    if self.terminated():
                        raise SIGTERMException
            progress.passes, progress.batches = progress.passes + 1, 0
            progress.total_passes += 1
        progress.passes = 0

    @contextlib.contextmanager
    def _own_randomness(self, step: int = 0) -> Iterator[None]:
        """Randomness that depends on the pass and ``step`` alone, and leaves the generators outside as they were.

        Shuffling and augmentation of the data have one such stream (0), and each step its own, so that a pass
        resumed after k steps goes on as if it had made them.
        """
        with isolate_rng():
            seed = (self.seed + self.progress.total_passes + step * 0x9E3779B97F4A7C15) % 2**64
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
