from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

Curves = Mapping[str, Sequence[Sequence[float]]]
"""By label, one series over epochs for each seed."""


def draw_learning_curves(panels: Mapping[str, Curves], path: Path) -> None:
    """Draw a panel each of means over seeds, with a band from the lowest to the highest.

    Args:
        panels: curves by the panel's title.
        path: the image to write.
    """
    from matplotlib.figure import Figure

    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(6.4 * columns, 3.8 * rows), layout="constrained")
    for number, (title, curves) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, columns, number)
        for label, series in curves.items():
            length = max(map(len, series))
            at = [[one[i] for one in series if i < len(one)] for i in range(length)]
            epochs = range(1, length + 1)
            (line,) = axes.plot(epochs, [sum(v) / len(v) for v in at], label=label, linewidth=1.2)
            axes.fill_between(epochs, [min(v) for v in at], [max(v) for v in at], color=line.get_color(), alpha=0.15)
        axes.set(title=title, xlabel="epoch", yscale="log")
        axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
