from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dfc_lightning.errors import ControlError
from dfc_lightning.plots.canvas import COLORS, DASHES, by_epochs, legend_below, logarithmic, panels, styled
from dfc_lightning.plots.runs import Run, read_run, told_apart

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Panel(NamedTuple):
    """Quantities that are drawn together."""

    title: str
    quantities: dict[str, str]
    """Logged names, and how each is called in the legend."""
    logarithmic: bool = False


_DYNAMICS = (
    Panel("settled samples, share", {"settling/converged": "converged"}),
    Panel("residual of the steady state", {"settling/residual": "residual"}, logarithmic=True),
    Panel("settling iterations", {"settling/iterations": "iterations"}),
    Panel("norm of the feedback weights", {"feedback/norm": "‖Q‖"}),
    Panel("norm of their gradient", {"feedback/grad_norm": "‖∇Q‖"}, logarithmic=True),
    Panel(
        "angle of the update to that of …, °",
        {
            "alignment/backprop/total": "backprop",
            "alignment/gauss_newton/total": "Gauss–Newton",
            "alignment/minimum_norm/total": "minimum norm",
            "alignment/ssa/total": "DFC-SSA",
        },
    ),
    Panel(
        "angle of the feedback weights to …, °",
        {
            "alignment/feedback_to_transpose": "$J^T$",
            "alignment/feedback_to_pseudoinverse": r"$J^T(JJ^T + \gamma I)^{-1}$",
        },
    ),
    Panel(
        "Conditions 1 (0 is ideal) and 2 (1 is)",
        {"alignment/condition_1": "1: spread of ‖r‖", "alignment/condition_2": "2: share of $Q$ in row space of $J$"},
    ),
    Panel(
        "stability: largest real part (below 0)",
        {"alignment/condition_3": "of −(JQ + α̃I)", "alignment/stability": "of network and controller"},
    ),
    Panel("strength of control, ‖Qu‖ / ‖Wr‖", {"alignment/control_ratio/total": "all layers"}, logarithmic=True),
)


@styled
def dashboard(runs: Run | str | Path | Sequence[Run | str | Path]) -> Figure:
    """A run at a glance, or several in the same panels: whatever is there of losses, errors, settling and feedback.

    Losses and errors are all quantities whose names end in ``loss`` and ``error``.

    Args:
        runs: one run, with a colour for each quantity; or several, with a colour for each run. Runs, or their
            folders, as for :func:`read_run`.

    Raises:
        FileNotFoundError: a folder holds no run.
        ControlError: there is nothing to draw.
    """
    given = [runs] if isinstance(runs, (Run, str, Path)) else runs
    runs = told_apart([run if isinstance(run, Run) else read_run(run) for run in given])
    logged = dict.fromkeys(name for run in runs for name in run.series)
    results = (
        Panel("loss", _ending(logged, "loss"), logarithmic=True),
        Panel("error, %", _ending(logged, "error")),
    )
    shown = [panel for panel in (*results, *_DYNAMICS) if any(name in logged for name in panel.quantities)]
    if not shown:
        names = ", ".join(run.name for run in runs)
        raise ControlError(f"RUN={names}: nothing was logged that a dashboard shows. Train for an epoch at least.")
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure, axes = panels(
        rows, columns, width=3.6 * columns, height=(2.7 if len(runs) == 1 else 2.7 + 0.16 * len(runs)) * rows
    )
    alone = len(runs) == 1
    for axis, panel in zip(axes, shown):
        for row, run in enumerate(runs):
            for column, (quantity, called) in enumerate(panel.quantities.items()):
                if quantity not in run.series:
                    continue
                feedback = quantity.startswith("feedback/")
                x, y = run.series[quantity] if feedback else run.by_epoch(quantity)
                axis.plot(
                    x,
                    y,
                    color=COLORS[(column if alone else row) % len(COLORS)],
                    linestyle="-" if alone else DASHES[column % len(DASHES)],
                    marker="o" if len(x) == 1 else None,
                    label=called if alone else f"{run.name}: {called}",
                )
                by_epochs(axis, "feedback learning step" if feedback else "epoch" if run.steps_per_epoch else "step")
        axis.set_title(panel.title)
        if panel.logarithmic:
            logarithmic(axis)
        if len(axis.lines) > 1:
            legend_below(axis, 2 if alone else 1)
    for axis in axes[len(shown) :]:
        axis.remove()
    return figure


def _ending(logged: Iterable[str], ending: str) -> dict[str, str]:
    return {name: name for name in logged if name.endswith(ending)}
