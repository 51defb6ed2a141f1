from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dfc_lightning.errors import ControlError
from dfc_lightning.plots.canvas import BLUE, COLORS, GREEN, PURPLE, RED, by_epochs, panels, styled
from dfc_lightning.plots.runs import Run, smoothed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = {
    "alignment/gauss_newton/total": "angle to damped Gauss–Newton, °",
    "alignment/minimum_norm/total": "angle to minimum norm, °",
    "alignment/condition_2": "Condition 2 (ideal: 1)",
    "alignment/ssa/total": "angle to DFC-SSA, °",
    "alignment/stability": r"stability: largest $\mathrm{Re}\,\lambda(A)$",
    "val/loss": "validation loss",
}
"""What is drawn of each run, and each panel's title."""

RULES = {
    "dfc": ("DFC", BLUE, 1.4),
    "dfc_ss": ("DFC-SS", GREEN, 2.2),
    "dfc_ssa": ("DFC-SSA", PURPLE, 0.9),
    "dfa": ("DFA", RED, 1.4),
}
"""Label, colour and line width of the rules, by the names of their runs; DFC-SSA is to be seen upon DFC-SS."""

FIXED = "_fixed"
"""How the names of runs with fixed feedback end; they are drawn dashed."""


@styled
def figure_3(runs: Sequence[Run], window: int = 10) -> Figure:
    """Updates and conditions over training, in six panels: Figure 3 of Meulemans et al. (2021).

    Angles of the rule's update to the update of Gauss-Newton for each sample alone, to the minimum-norm update and
    to DFC-SSA's, Condition 2, the largest real part of the eigenvalues of the network under control, and the
    validation loss, which takes the place of the paper's panel of Condition 1. Bold is the mean of ``window`` values
    about an epoch, faint the values themselves. A quantity that a run has not logged is left out.

    Args:
        runs: runs of the recipes in ``recipes/toy``, or others with ``AlignmentMonitor(tau_ratio=...)``.
        window: length of the mean.

    Raises:
        ControlError: a run has logged no angle.
    """
    for run in runs:
        if not any(name in run.series for name in PANELS if name.startswith("alignment/")):
            raise ControlError(
                f"RUN={run.name}: it has logged no alignment/* for Figure 3. Train with the callback AlignmentMonitor, "
                "as the recipes in recipes/toy do, or draw its dashboard."
            )
    figure, axes = panels(2, 3, width=10, height=5.4)
    handles = {}
    for number, run in enumerate(runs):
        rule = run.name.removesuffix(FIXED)
        label, color, width = RULES.get(rule, (rule, COLORS[number % len(COLORS)], 1.4))
        dash = "--" if run.name.endswith(FIXED) else "-"
        label += " (fixed)" if run.name.endswith(FIXED) else ""
        for axis, quantity in zip(axes, PANELS):
            if quantity in run.series:
                epochs, values = run.by_epoch(quantity)
                axis.plot(epochs, values, dash, color=color, linewidth=0.5, alpha=0.2)
                means = smoothed(values, window)
                (handles[label],) = axis.plot(epochs, means, dash, color=color, linewidth=width, label=label)
    for axis, title in zip(axes, PANELS.values()):
        axis.set_title(title)
    for axis in axes[3:]:
        by_epochs(axis)
    figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=len(handles))
    return figure
