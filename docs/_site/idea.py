"""Draws docs/idea.svg and docs/leakage.svg: `python docs/_site/idea.py`. A few seconds; needs the `recipes` extra."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch import Tensor

from dfc_lightning import (
    Backprop,
    ControlledNetwork,
    LayeredDFC,
    Layerwise,
    LearningRule,
    MinimumNorm,
    PIController,
)
from dfc_lightning.data import Digits
from dfc_lightning.metrics import update_angle
from dfc_lightning.models import MLP
from dfc_lightning.plots.canvas import BLUE, GREY, RED, panels, styled
from dfc_lightning.settling import SteadyState

DOCS = Path(__file__).parents[1]


def _box(axes: Axes, x: float, text: str, color: str, y: float = 1.0, width: float = 1.1) -> None:
    shape = FancyBboxPatch((x - width / 2, y - 0.3), width, 0.6, "round,pad=0,rounding_size=0.1", fc="white", ec=color)
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", fontsize=9, color=color)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str, bend: float = 0.0) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 11, "color": color, "lw": 1.3, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(start, end, connectionstyle=f"arc3,rad={bend}", **style))


def _network(axes: Axes, controlled: bool) -> None:
    axes.set(xlim=(-0.9, 7.3), ylim=(-1.1 if controlled else -0.1, 2.1))
    axes.set_aspect("equal")
    axes.axis("off")
    axes.set_title("Deep Feedback Control" if controlled else "Backpropagation", fontsize=10)
    places = (0.0, 1.9, 3.8, 5.7)
    for number, x in enumerate(places):
        _box(axes, x, "input" if number == 0 else f"layer {number}" if number < 3 else "output", "black")
    for left, right in zip(places, places[1:]):
        _arrow(axes, (left + 0.55, 1.0), (right - 0.55, 1.0), "black")
        axes.text((left + right) / 2, 1.13, f"$W_{places.index(right)}$", ha="center", fontsize=8)
    if controlled:
        _box(axes, 5.7, "controller", RED, y=-0.75, width=1.45)
        _arrow(axes, (5.7, 0.7), (5.7, -0.45), RED)
        axes.text(5.8, 0.1, "target − output", fontsize=8, color=RED, va="center")
        for number, x in ((1, 1.9), (2, 3.8)):
            axes.plot([4.97, x], [-0.75, -0.75], color=RED, lw=1.3, solid_capstyle="butt")
            _arrow(axes, (x, -0.75), (x, 0.7), RED)
            axes.text(x + 0.1, 0.0, f"feedback {number}", fontsize=8, color=RED, va="center")
        axes.text(0.0, 1.75, "Learns by the change of its own activity:", fontsize=8.5, color=RED)
        axes.text(4.35, 1.75, r"$\Delta W_i \propto (r_i^{controlled} - r_i)\, r_{i-1}^T$", fontsize=9, color=RED)
    else:
        axes.text(6.35, 1.0, "∂loss", fontsize=8, color=BLUE, va="center")
        for left, right in zip(places[1:], places[2:]):
            _arrow(axes, (right - 0.1, 0.68), (left + 0.1, 0.68), BLUE, bend=-0.35)
            axes.text((left + right) / 2, 0.12, f"$W_{places.index(right)}^T$", ha="center", fontsize=8, color=BLUE)
        axes.text(0.0, 1.75, "Learns by errors sent back through the transposed weights", fontsize=8.5, color=BLUE)


@styled
def idea() -> Figure:
    """What teaches a layer, by backpropagation and under control."""
    figure, axes = panels(2, 1, width=6.2, height=5.2)
    _network(axes[0], controlled=False)
    _network(axes[1], controlled=True)
    return figure


class Copied(LayeredDFC):
    """Layered DFC by feedback weights that are the weights: what is left of the angle is the rule's own."""

    feedback: ClassVar[Layerwise] = Layerwise(init="weights")


def gradients(mlp: MLP, rule: LearningRule, x: Tensor, y: Tensor) -> list[Tensor]:
    """What a rule leaves in ``.grad``."""
    net = ControlledNetwork(mlp)
    with net.taught_by(rule):
        loss = F.cross_entropy(net(x), y)
    mlp.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in mlp.parameters() if p.grad is not None]


def trained() -> tuple[MLP, Tensor, Tensor]:
    """A net after 60 steps, so that its samples differ in their slopes, and a batch."""
    torch.manual_seed(0)
    data = Digits(batch_size=256, shuffle=False)
    data.setup()
    x, y = next(iter(data.train_dataloader()))
    mlp, x = MLP([64, 64, 64, 10]).double(), x.double()
    optimizer = torch.optim.Adam(mlp.parameters(), 2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(mlp(x), y).backward()
        optimizer.step()
    return mlp, x, y


@styled
def leakage() -> Figure:
    """The angle of the update to backprop's and to the minimum-norm one, over the leakage α."""
    mlp, x, y = trained()
    backprop = gradients(mlp, Backprop(), x, y)
    least = gradients(mlp, MinimumNorm(damping=1e-3, plasticity="voltage_difference", relative=True), x, y)
    alphas = torch.logspace(-2, 2, 17).tolist()
    ours = [gradients(mlp, Copied(SteadyState(rtol=1e-6), PIController(alpha)), x, y) for alpha in alphas]
    figure, (axis,) = panels(1, 1, width=5.2, height=2.9)
    for name, reference, color in (("backprop", backprop, BLUE), ("minimum norm", least, RED)):
        axis.semilogx(alphas, [update_angle(each, reference)["total"] for each in ours], color=color, label=name)
    axis.axvline(10, color=GREY, lw=0.8, ls=":")
    axis.text(11, 12, "the default", color=GREY, fontsize=8)
    axis.set(xlabel="leakage α of the controller", ylabel="degrees", ylim=(0, None))
    axis.set_title("Angle of the update of LayeredDFC() to that of")
    axis.legend()
    return figure


if __name__ == "__main__":
    matplotlib.rcParams["svg.hashsalt"] = "dfc"
    for draw in (idea, leakage):
        draw().savefig(DOCS / f"{draw.__name__}.svg", metadata={"Date": None}, bbox_inches="tight", facecolor="white")
