"""Running a recipe with a seed, once, whatever interrupts it."""

from __future__ import annotations

import logging
import platform
import signal
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import lightning
import lightning.pytorch as pl
import torch
from filelock import FileLock, Timeout
from lightning.pytorch.callbacks import Callback

import dfc_lightning
from dfc_lightning.experiments.checkpoints import newest_whole
from dfc_lightning.experiments.errors import Stopped
from dfc_lightning.experiments.history import EpochOrder, HistoryFile
from dfc_lightning.experiments.ledger import Ledger, LedgerError, Result
from dfc_lightning.experiments.memory import PeakMemory
from dfc_lightning.experiments.protocol import reported
from dfc_lightning.experiments.recipe import Recipe
from dfc_lightning.experiments.recipe_cli import RecipeCLI


class Claimed(Exception):
    """Another process is at this run."""


@dataclass(frozen=True)
class Run:
    """A recipe with a seed, so many epochs long.

    Args:
        recipe: the recipe.
        seed: seeds weights, feedback weights, noise and order of the data.
        epochs: how many to train.
        overrides: options laid over the recipe, ``KEY=VALUE``; those the recipe was loaded with.
    """

    recipe: Recipe
    seed: int
    epochs: int
    overrides: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.recipe.name} seed {self.seed}"

    def folder(self, runs: Path) -> Path:
        """Where it is kept; runs of other lengths share it, and go on from each other."""
        return runs / self.recipe.name / self.recipe.fingerprint / f"seed_{self.seed}"

    def done(self, ledger: Ledger) -> Result | None:
        """Its result, if it is finished, or a longer one that holds it."""
        return ledger.find(self.recipe.name, self.recipe.fingerprint, self.seed, self.epochs)


def perform(run: Run, runs: Path, ledger: Ledger, on_epoch: Callable[[int, dict[str, float]], None]) -> Result:
    """Finish a run and note its result; from its last complete epoch, if it was interrupted.

    Args:
        run: what to run.
        runs: where runs are kept.
        ledger: where results are noted.
        on_epoch: told how many epochs are complete, at the start and after each, and the latest figures.

    Raises:
        Claimed: another process is at it.
        LedgerError: it is finished, but could not be noted.
        Stopped: a signal asked for it.
    """
    folder = run.folder(runs)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):  # the system lets go of it when a process is killed
            found = run.done(ledger)
            if found is None:
                result, stopped = _train(run, folder, on_epoch)
                found = _noted(result, folder, ledger)
                if stopped:
                    raise Stopped(signal.SIGTERM, None)
            return found
    except Timeout as error:
        raise Claimed(str(run)) from error


def _noted(result: Result, folder: Path, ledger: Ledger) -> Result:
    try:
        return ledger.append(result)
    except LedgerError as error:
        raise LedgerError(
            f"the run is finished, but {error}. Nothing is lost: its figures and checkpoints are in {folder}. Give the "
            "same command again when that is mended; it notes the run without training it again."
        ) from error


def _train(run: Run, folder: Path, on_epoch: Callable[[int, dict[str, float]], None]) -> tuple[Result, bool]:
    """The result, and whether the process was asked to end too late to stop the run."""

    class Fit(RecipeCLI):
        saves_on_leaving = False  # an attempt goes on from the last complete epoch, as if there had been no other

        def after_fit(self) -> None:
            """Every epoch has been tested already."""

    history, last = HistoryFile(folder), newest_whole(folder / "checkpoints")
    options = [
        f"--config={run.recipe.path}",
        *(f"--{override}" for override in run.overrides),
        f"--seed_everything={run.seed}",
        f"--trainer.max_epochs={run.epochs}",
        f"--trainer.default_root_dir={folder}",
        "--trainer.logger=false",
        "--trainer.num_sanity_val_steps=0",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
    ]
    if last is not None:
        options.append(f"--ckpt_path={last}")
    memory = PeakMemory()
    with _quiet():
        callbacks = [EpochOrder(run.seed), history, _Progress(history, on_epoch)]
        fit = Fit(["fit", *options], callbacks, exit_on_error=False)
    series = history.series()
    seconds = series.pop("seconds")
    value, epoch = reported(series, run.recipe.metric)
    device = fit.trainer.strategy.root_device
    result = Result(
        recipe=run.recipe.name,
        fingerprint=run.recipe.fingerprint,
        overrides=list(run.overrides),
        seed=run.seed,
        epochs=len(history.epochs),
        protocol_epochs=run.recipe.epochs,
        metric=run.recipe.metric,
        value=value,
        best_epoch=epoch,
        history=series,
        seconds=sum(seconds),
        seconds_per_epoch=statistics.median(seconds),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        threads=torch.get_num_threads(),
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "dfc_lightning": dfc_lightning.__version__,
        },
        peak_bytes=memory.read(device),
    )
    return result, fit.trainer.received_sigterm


class _Progress(Callback):
    """Tells how many epochs are complete."""

    def __init__(self, history: HistoryFile, on_epoch: Callable[[int, dict[str, float]], None]) -> None:
        self.history, self.on_epoch = history, on_epoch

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.on_epoch(len(self.history.epochs), {})

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.on_epoch(len(self.history.epochs), self.history.epochs[-1])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Lightning tells at every start."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.WARNING)
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def plan(recipes: Sequence[Recipe], seeds: int, epochs: int | None, overrides: Sequence[str] = ()) -> list[Run]:
    """All runs, each recipe's first seed before any second; as long as the recipes say, or ``epochs``."""
    return [Run(recipe, seed, epochs or recipe.epochs, tuple(overrides)) for seed in range(seeds) for recipe in recipes]
