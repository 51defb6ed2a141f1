from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from typing_extensions import override

from dfc_lightning.feedback_learning import FeedbackLearner
from dfc_lightning.network.judging import found_loss
from dfc_lightning.training.controlled import ControlledTraining
from dfc_lightning.training.loop import silenced

LARGE = 0.05
"""Seconds that a step takes, on one thread, of a network which more threads serve."""

WORTH = 0.9
"""More threads are taken for steps that take less than this share of their time on fewer."""

_REPEATS, _MOST_PARAMETERS = 3, 20_000_000


class ChooseThreads(Callback):
    """Chooses torch's threads on a CPU by measurement, where a step of training is short, and says so in a line.

    Threads wait for each other many times a step. For small networks that costs more than they save, and a hundred
    times more where other programs share the cores. Before the first batch a copy of the module makes some steps of
    the strategy's rule on 1, 2, 4, … threads, up to those torch has; the module, the generators and the data are left
    alone. Nothing is measured where one thread is all there is, where ``OMP_NUM_THREADS`` is set, with several
    processes, or where the module cannot be copied or run by itself.

    Args:
        threads: take so many, and measure nothing.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[ChooseThreads()], logger=False, enable_checkpointing=False)
    """

    def __init__(self, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"threads={threads} must be one or more, or None to choose by measurement.")
        self.threads = threads
        self.chosen: int | None = None
        """What was measured to be best; None if nothing was measured."""
        self._pending = True

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.threads is not None:
            torch.set_num_threads(self.threads)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._pending or self.threads is not None:
            return
        self._pending = False
        most = torch.get_num_threads()
        alone = trainer.world_size == 1 and pl_module.device.type == "cpu"
        if most == 1 or not alone or os.environ.get("OMP_NUM_THREADS"):
            return
        if sum(p.numel() for p in pl_module.parameters()) > _MOST_PARAMETERS:
            return
        try:
            times = _times(_step_of_a_copy(trainer, pl_module, batch, batch_idx), most)
        except Exception:  # a module that cannot be copied, or whose step needs its trainer
            torch.set_num_threads(most)
            return
        if not times:
            return
        chosen = 1
        for threads, seconds in times.items():
            chosen = threads if seconds < WORTH * times[chosen] else chosen
        torch.set_num_threads(chosen)
        self.chosen = chosen
        told = ", ".join(f"{1e3 * seconds:.3g} ms on {threads}" for threads, seconds in times.items())
        rank_zero_info(f"Threads: {chosen}, by measurement: a step takes {told}. OMP_NUM_THREADS overrides this.")


def _times(step: Callable[[], None], most: int) -> dict[int, float]:
    """Seconds a step, by threads; the least of some. Nothing if it is long on one thread."""
    times: dict[int, float] = {}
    threads = 1
    while True:
        torch.set_num_threads(threads)
        step()
        times[threads] = float("inf")
        best = min(times.values())
        for _ in range(_REPEATS):
            start = time.perf_counter()
            step()
            taken = time.perf_counter() - start
            times[threads] = min(times[threads], taken)
            if taken > 2 * best:
                return times
        if times[1] > LARGE:
            torch.set_num_threads(most)
            return {}
        if threads == most:
            return times
        threads = min(2 * threads, most)


def _step_of_a_copy(trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> Callable[[], None]:
    """A training step of a copy of the module, by the strategy's rule, with what feedback learning follows it."""
    module.trainer = None
    try:
        twin = copy.deepcopy(module)
    finally:
        module.trainer = trainer
    strategy = trainer.strategy
    network = learner = None
    if isinstance(strategy, ControlledTraining) and strategy.network is not None:
        network = strategy.controlled(twin, strategy.feedback_init, strategy.network.seed)
        if strategy.learning is not None and strategy.learning.every_n_batches:
            learner = FeedbackLearner(network, strategy.learning, strategy.network.seed)

    def loss() -> Tensor:
        with isolate_rng():
            output: Any = twin.training_step(copy.deepcopy(batch), batch_idx)
        return output if isinstance(output, Tensor) else output["loss"]

    def step() -> None:
        with isolate_rng(), torch.enable_grad(), silenced(twin):
            twin.zero_grad()
            if network is None:
                loss().backward()
                return
            if network.loss is None and strategy.rule.asks_for_loss:  # type: ignore[attr-defined]
                network.loss = found_loss(network, loss, strategy.loss_reduction)  # type: ignore[attr-defined]
            with network.taught_by(strategy.rule, strategy.loss_reduction) as lesson:  # type: ignore[attr-defined]
                found = loss()
            found.backward()
            if learner is not None and lesson.forward is not None:
                with torch.no_grad():
                    learner.step(lesson.forward.again())

    return step
