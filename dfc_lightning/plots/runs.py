"""What a run has logged, read from the ``metrics.csv`` of Lightning's ``CSVLogger``."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

METRICS = "metrics.csv"


class RunError(ValueError):
    """A run that cannot be read; the message names the file."""


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
    if (path / METRICS).is_file():
        return path
    versions = [folder for folder in path.glob("version_*") if (folder / METRICS).is_file()]
    if not versions:
        raise FileNotFoundError(
            f"RUN={path}: neither it nor a version_* folder in it holds a {METRICS}. Give the folder of a run that "
            "was logged by CSVLogger, e.g. runs/digits/dfc."
        )
    return max(versions, key=lambda folder: (_has_trained(folder), _number(folder)))


def _has_trained(folder: Path) -> bool:
    """Whether more was logged than a test."""
    with open(folder / METRICS, encoding="utf-8", errors="replace", newline="") as file:
        names = next(csv.reader(file), [])
    return any(name not in ("step", "epoch") and not name.startswith("test/") for name in names)


def told_apart(runs: Sequence[Run]) -> list[Run]:
    """The same with names of their own: those of one name say which version each is."""
    names = [run.name for run in runs]
    return [replace(run, name=f"{run.name} {run.version}") if names.count(run.name) > 1 else run for run in runs]


def read_run(path: str | Path) -> Run:
    """Read a run.

    Args:
        path: the folder that holds ``metrics.csv``, or one with ``version_*`` folders, of which the newest that has
            trained is read.

    Raises:
        FileNotFoundError: there is no such folder.
        RunError: it cannot be read.
    """
    folder = find_run(Path(path))
    series: dict[str, Series] = {}
    epoch_length = 0.0
    for row in _rows(folder / METRICS):
        logged = dict(row)
        step, epoch = logged.pop("step"), logged.pop("epoch", None)
        step = logged.pop("feedback/step", step)
        if epoch is not None:
            step += 1  # Lightning counts it from zero
            epoch_length = max(epoch_length, step / (epoch + 1))  # less than it before an epoch's last step
        for name, value in logged.items():
            steps, values = series.setdefault(name, Series([], []))
            steps.append(step)
            values.append(value)
    name = folder.resolve().parent.name if _number(folder) >= 0 else folder.resolve().name
    return Run(name, series, epoch_length or None, folder.resolve().name)


def _rows(path: Path) -> list[dict[str, float]]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
        if not all("step" in row for row in rows):
            raise ValueError("a row has no step")
    except (ValueError, TypeError, csv.Error) as error:
        raise RunError(f"{path} is damaged: not what a CSVLogger writes ({error}). Give another run.") from error
    return rows


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
