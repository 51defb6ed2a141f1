"""What a run has logged: each quantity over steps, and over epochs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from dfc_lightning.plots.sources import METRICS, WANDB, Row, RunError, holds_run, logged_rows, wandb_rows


class Series(NamedTuple):
    """One logged quantity: its steps and its values there, of equal length."""

    steps: list[float]
    values: list[float]


@dataclass(frozen=True)
class Run:
    """A run's logged quantities.

    Args:
        name: what the run is called, the folder above its ``version_*``.
        series: each quantity by its logged name. Its steps are optimizer steps, or feedback learning steps for what
            begins with ``feedback/``.
        steps_per_epoch: optimizer steps in an epoch; None if no quantity was logged by epochs.
        version: its folder, which tells it from other runs of the name.
    """

    name: str
    series: dict[str, Series]
    steps_per_epoch: float | None
    version: str = ""

    def by_epoch(self, quantity: str) -> Series:
        """The quantity with epochs passed in the place of optimizer steps, where these are known."""
        steps, values = self.series[quantity]
        return Series([step / (self.steps_per_epoch or 1) for step in steps], values)


def find_run(path: Path) -> Path:
    """The folder at ``path`` that holds a run: this one, or the newest ``version_*`` in it that has trained.

    Raises:
        FileNotFoundError: there is none.
    """
    if holds_run(path):
        return path
    versions = sorted((folder for folder in path.glob("version_*") if holds_run(folder)), key=_number, reverse=True)
    if not versions:
        raise FileNotFoundError(
            f"RUN={path}: neither it nor a version_* folder in it holds a {METRICS} or TensorBoard's events. Give the "
            f"folder of a run that was logged so, e.g. runs/digits/dfc, or {WANDB}ENTITY/PROJECT/ID."
        )
    return next(filter(_has_trained, versions), versions[0])


def _has_trained(folder: Path) -> bool:
    """Whether more was logged than a test."""
    try:
        names = (name for row in logged_rows(folder) for name in row)
        return any(name not in ("step", "epoch") and not name.startswith("test/") for name in names)
    except RunError:
        return True  # to be told of, if it is the newest


def told_apart(runs: Sequence[Run]) -> list[Run]:
    """The same with names of their own: those of one name say which version each is."""
    names = [run.name for run in runs]
    return [replace(run, name=f"{run.name} {run.version}") if names.count(run.name) > 1 else run for run in runs]


def read_run(path: str | Path) -> Run:
    """Read a run.

    Args:
        path: the folder that holds ``metrics.csv`` or TensorBoard's events, or one with ``version_*`` folders, of which
            the newest that has trained is read; or ``wandb:ENTITY/PROJECT/ID``, a run on a Weights & Biases server.

    Raises:
        FileNotFoundError: there is no such folder.
        RunError: it cannot be read.
    """
    if str(path).startswith(WANDB):
        where = str(path).removeprefix(WANDB)
        return _run(*wandb_rows(where), version=where.rpartition("/")[2])
    folder = find_run(Path(path))
    name = folder.resolve().parent.name if _number(folder) >= 0 else folder.resolve().name
    return _run(name, logged_rows(folder), version=folder.resolve().name)


def _run(name: str, rows: Iterable[Row], version: str) -> Run:
    series: dict[str, Series] = {}
    epoch_length = 0.0
    for row in rows:
        logged = dict(row)
        step, epoch = logged.pop("step"), logged.pop("epoch", None)
        step = logged.pop("feedback/step", step)
        if epoch is not None:
            step += 1  # Lightning counts it from zero
            epoch_length = max(epoch_length, step / (epoch + 1))  # less than it before an epoch's last step
        for quantity, value in logged.items():
            steps, values = series.setdefault(quantity, Series([], []))
            steps.append(step)
            values.append(value)
    return Run(name, series, epoch_length or None, version)


def smoothed(values: list[float], window: int) -> list[float]:
    """Each value's mean with those up to ``window`` // 2 away on both sides; what is no number is left out.

    Example:
        >>> smoothed([1.0, 3.0, float("nan"), 5.0], window=3)
        [2.0, 2.0, 4.0, 5.0]
    """
    means, half = [], window // 2
    for at in range(len(values)):
        within = [value for value in values[max(0, at - half) : at + half + 1] if math.isfinite(value)]
        means.append(sum(within) / len(within) if within else math.nan)
    return means


def _number(folder: Path) -> int:
    """The number of a ``version_*`` folder; −1 for another folder."""
    number = folder.name.removeprefix("version_")
    return int(number) if number.isdigit() and number != folder.name else -1
