"""Which feedback stage runs when, and how far it has come."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from dfc_lightning.feedback_learning.learner import FeedbackLearning
from dfc_lightning.training.bounds import Deadline, batches_in_pass, batches_left
from dfc_lightning.training.progress import stage_bar


@dataclass
class StageProgress:
    """Where feedback learning stands; saved with a checkpoint, so that a run resumes within a pass.

    Args:
        initial_done: whether the initial passes are complete.
        epoch: the last epoch whose own passes are complete.
        passes: complete passes of the stage under way; on data that are drawn once, steps on the batch in hand.
        batches: complete batches of the pass under way; on data that are drawn once, of the stage.
        total_passes: complete passes of all stages; on data that are drawn once, steps.
        last_epoch: epoch of the training batch that was last learned from in hand.
        last_batch: its index.
    """

    initial_done: bool = False
    epoch: int = -1
    passes: int = 0
    batches: int = 0
    total_passes: int = 0
    last_epoch: int = -1
    last_batch: int = -1

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name, value in state.items():
            setattr(self, name, value)

    def new_trainer(self) -> None:
        """Be ready for a trainer that counts its epochs from the start."""
        self.epoch = self.last_epoch = self.last_batch = -1


class FeedbackStages:
    """Runs the passes that are due before an epoch's first training batch.

    Data that can be drawn but once are left to training. There a pass is made of the batches that training draws:
    each is learned from before its training step, as often as there are passes.

    Args:
        learning: how many passes.
        learn: one feedback learning step on a batch, given also its index, whether the pass is an initial one, and
            whether the batch is in hand.
        seed: the order of the data in pass k depends on this and k alone.
        on_any: which of some conditions hold in any of the processes, so that all stop at the same batch; it ends the
            run if one was told to terminate.
    """

    def __init__(
        self,
        learning: FeedbackLearning,
        learn: Callable[[Any, int, bool, bool], dict[str, Tensor]],
        seed: int,
        on_any: Callable[[Sequence[bool]], list[bool]],
    ) -> None:
        self.learning, self.learn, self.seed, self.on_any = learning, learn, seed, on_any
        self.progress = StageProgress()

    def due(self, trainer: pl.Trainer) -> bool:
        """Whether there may be something to learn before the next training step."""
        return not self.progress.initial_done or self.progress.epoch < trainer.current_epoch

    def run(self, trainer: pl.Trainer, batches: Callable[[int], Iterable[Any]], log: Callable[..., None]) -> None:
        """Run or finish what is due.

        Args:
            trainer: the trainer, in fit, with an epoch begun.
            batches: makes a new pass over the training batches, given how many there were before.
            log: takes the metrics of a step.
        """
        progress, deadline = self.progress, Deadline(trainer)
        if not progress.initial_done:
            self._stage(trainer, "initial feedback pass", self.learning.initial_passes, deadline, batches, log)
            progress.initial_done = True
        if progress.epoch < trainer.current_epoch:
            self._stage(trainer, "feedback pass", self.learning.passes_per_epoch, deadline, batches, log)
            progress.epoch = trainer.current_epoch

    def run_in_hand(self, trainer: pl.Trainer, batch: Any, batch_idx: int, log: Callable[..., None]) -> None:
        """Make the steps that are due on the batch that is to be trained on next.

        Args:
            trainer: the trainer, in fit, with an epoch begun.
            batch: the batch.
            batch_idx: its index in the epoch.
            log: takes the metrics of a step.
        """
        progress, most = self.progress, batches_in_pass(trainer, self.learning)
        if (progress.last_epoch, progress.last_batch) == (trainer.current_epoch, batch_idx):
            return  # resumed between this batch's feedback and training steps
        if progress.total_passes == 0:
            rank_zero_info(
                "The training data cannot be drawn again, as far as is known: feedback learns from each batch before "
                f"its training step, in the first {most} of an epoch, instead of in passes of its own."
            )
        initial = not progress.initial_done and self.learning.initial_passes > 0
        steps = self.learning.initial_passes if initial else self.learning.passes_per_epoch
        while progress.passes < steps and (initial or batch_idx < most):
            with self._own_randomness(batch_idx + 1):
                metrics = self.learn(copy.deepcopy(batch), batch_idx, initial, True)
            log(metrics)
            progress.passes, progress.total_passes = progress.passes + 1, progress.total_passes + 1
            self.on_any([])
        progress.passes, progress.last_epoch, progress.last_batch = 0, trainer.current_epoch, batch_idx
        progress.batches += 1
        if not initial or progress.batches >= most:
            progress.initial_done, progress.batches = True, 0
        if batch_idx + 1 >= most and progress.initial_done:
            progress.epoch = trainer.current_epoch

    def _stage(
        self,
        trainer: pl.Trainer,
        title: str,
        passes: int,
        deadline: Deadline,
        batches: Callable[[int], Iterable[Any]],
        log: Callable[..., None],
    ) -> None:
        progress, initial, late = self.progress, not self.progress.initial_done, False
        limit = min(batches_in_pass(trainer, self.learning), batches_left(trainer))
        while progress.passes < passes and not late:
            label = f"{title} {progress.passes + 1}/{passes}"
            with self._own_randomness(), stage_bar(trainer, label, limit, progress.batches) as advance:
                drawn = batches(progress.total_passes) if limit > 0 else ()
                for index, batch in enumerate(drawn):
                    if index >= progress.batches:  # else done before the interruption
                        with self._own_randomness(index + 1):
                            metrics = self.learn(batch, index, initial, False)
                        log(metrics)
                        progress.batches += 1
                        advance()
                        (late,) = self.on_any([deadline.over()])
                    if late or index + 1 >= limit:
                        break
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
