"""One style for all figures; the one place that imports matplotlib."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Arguments = ParamSpec("Arguments")

BLUE, GREEN, PURPLE, RED, ORANGE, SKY, GREY = (
    "#0072b2",
    "#009e73",
    "#8a4fa3",
    "#d55e00",
    "#e69f00",
    "#56b4e9",
    "#7f7f7f",
)
COLORS = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY)
"""Colours that readers with colour-blindness can tell apart (Okabe and Ito), but for the purple."""

DASHES = ("-", "--", ":", "-.")
"""For what colours do not tell apart any more."""

_STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.framealpha": 0.7,
    "legend.edgecolor": "none",
    "axes.titlelocation": "left",
    "lines.linewidth": 1.4,
}


def styled(draw: Callable[Arguments, Figure]) -> Callable[Arguments, Figure]:
    """Let a function that returns a figure draw it in the package's style."""

    @functools.wraps(draw)
    def in_style(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Figure:
        try:
            from matplotlib import rc_context
        except ImportError as error:
            raise ImportError(
                'Figures need matplotlib, which is not installed: pip install "dfc_lightning[recipes]"'
            ) from error
        with rc_context(_STYLE):
            return draw(*args, **kwargs)

    return in_style


def panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure that belongs to no window, and its empty axes, row by row.

    Args:
        rows: rows of axes.
        columns: axes in a row.
        width: width of the figure in inches.
        height: height of the figure in inches.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def by_epochs(axes: Axes, label: str = "epoch") -> None:
    """Whole numbers alone along what counts epochs or steps."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def logarithmic(axes: Axes) -> None:
    """A logarithmic scale whose numbers are written out where they span no more than three decades."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high <= 1e3 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=range(1, 10) if high <= 3 * low else (1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


LABELS_DEEP = 0.45
"""How far below the axes their labels reach, in inches."""


def legend_below(axes: Axes, columns: int = 2) -> None:
    """A legend under the axes and their labels, where it hides no curve."""
    from matplotlib.transforms import ScaledTranslation

    figure = axes.get_figure()
    assert figure is not None
    below = axes.transAxes + ScaledTranslation(0, -LABELS_DEEP, figure.dpi_scale_trans)
    axes.legend(loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=below, ncols=columns, borderaxespad=0)
