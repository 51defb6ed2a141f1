from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dfc_lightning.plots.canvas import COLORS, DASHES, by_epochs, legend_below, logarithmic, panels, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curves = Mapping[str, Sequence[Sequence[float]]]
"""By label, one series over epochs for each seed."""


def draw_learning_curves(curves_by_title: Mapping[str, Curves], path: Path) -> None:
    """Draw a panel each of means over seeds, with a band from the lowest to the highest.

    Args:
        curves_by_title: curves by the panel's title.
        path: the image to write.
    """
    figure = _learning_curves(curves_by_title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


@styled
def _learning_curves(curves_by_title: Mapping[str, Curves]) -> Figure:
    columns = min(len(curves_by_title), 2)
    rows = math.ceil(len(curves_by_title) / columns)
    figure, all_axes = panels(rows, columns, 6.4 * columns, 4.2 * rows)
    for axes, (title, curves) in zip(all_axes, curves_by_title.items()):
        for k, (label, series) in enumerate(curves.items()):
            length = max(map(len, series))
            at = [[one[i] for one in series if i < len(one)] for i in range(length)]
            epochs = range(1, length + 1)
            color, dash = COLORS[k % len(COLORS)], DASHES[k // len(COLORS) % len(DASHES)]
            marker = "o" if length == 1 else None
            axes.plot(epochs, [sum(v) / len(v) for v in at], dash, color=color, marker=marker, label=label)
            axes.fill_between(epochs, [min(v) for v in at], [max(v) for v in at], color=color, alpha=0.15)
        axes.set_title(title)
        logarithmic(axes)
        by_epochs(axes)
        legend_below(axes, 3)
    for axes in all_axes[len(curves_by_title) :]:
        axes.remove()
    return figure
