"""Which figure of a run is reported."""

from __future__ import annotations

import math
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
    best = min(range(len(validation)), key=lambda i: math.inf if math.isnan(validation[i]) else validation[i])
    return Reported(values[best], best)
