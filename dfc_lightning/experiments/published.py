from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """What a recipe should reach, as its source reports it.

    Args:
        metric: the figure's name: ``"test/error"`` (percent), ``"test/loss"`` or ``"train/loss"``.
        mean: its mean over seeds.
        std: its standard deviation over seeds.
        seeds: their number.
        source: where it is reported.
    """

    metric: str
    mean: float
    std: float
    seeds: int
    source: str

    def __str__(self) -> str:
        """In words, e.g. ``2.29 ± 0.097, 5 seeds, Meulemans et al. 2021, Table 1``."""
        return f"{self.mean:g} ± {self.std:g}, {self.seeds} seeds, {self.source}"
