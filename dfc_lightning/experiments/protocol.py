"""Which figure of a run is reported."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

History = Mapping[str, Sequence[float]]
"""Figures of every epoch by name: ``train/loss``, ``val/error``, ``test/error``, ..."""


class Reported(NamedTuple):
    """A run's figure, and the epoch, from 0, that it is of."""

    value: float
    epoch: int


def reported(history: History, metric: str, epochs: int | None = None) -> Reported:
    """A run's figure by the protocol of Meulemans et al. (2021).

    A test figure is that of the epoch of best validation, the first if there are several. A training loss is that of
    the last epoch: the paper does not say of which, and the authors' code records the last, the lowest and that of
    best validation.

    Args:
        history: figures of every epoch.
        metric: ``"test/..."`` or ``"train/..."``.
        epochs: count only so many, from the start.
    """
    values = list(history[metric])[:epochs]
    if not metric.startswith("test/"):
        return Reported(values[-1], len(values) - 1)
    validation = list(history[metric.replace("test/", "val/", 1)])[:epochs]
    best = _lowest(validation)
    return Reported(values[best], best)


def best_test(history: History, metric: str, epochs: int | None = None) -> Reported:
    """The lowest test figure of all epochs, chosen by itself: as some projects report, and too good by that choice.

    Args:
        history: figures of every epoch.
        metric: ``"test/..."``.
        epochs: count only so many, from the start.
    """
    values = list(history[metric])[:epochs]
    best = _lowest(values)
    return Reported(values[best], best)


def _lowest(values: Sequence[float]) -> int:
    """Where the lowest is that is a number, the first if there are several."""
    return min(range(len(values)), key=lambda i: math.inf if math.isnan(values[i]) else values[i])


def median_of_last(history: History, metric: str, epochs: int | None = None, last: int = 10) -> float:
    """The median over the last epochs, which no single one of them decides.

    Args:
        history: figures of every epoch.
        metric: its name.
        epochs: count only so many, from the start.
        last: over how many.
    """
    return statistics.median(list(history[metric])[:epochs][-last:])
