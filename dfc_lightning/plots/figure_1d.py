from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dfc_lightning.errors import require
from dfc_lightning.passes.dense import DensePass
from dfc_lightning.plots.canvas import BLUE, GREY, RED, panels, styled
from dfc_lightning.settling.controller import PIController
from dfc_lightning.settling.dense_dynamics import Dynamics
from dfc_lightning.settling.time_step import TimeStep

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Recording:
    """One sample under control, from its feedforward state on, at T + 1 times.

    Args:
        time: in units of τ_u, (T + 1,).
        output: r_L, (T + 1, n_L).
        target: r_L*, (n_L,).
        control: u, (T + 1, n_L).
        somatic: v_i less its feedforward value, one (T + 1, n_i) a layer.
        basal: v_i^ff less its feedforward value, likewise.
        apical: v_i^fb, likewise; it is zero without control.
    """

    time: Tensor
    output: Tensor
    target: Tensor
    control: Tensor
    somatic: list[Tensor]
    basal: list[Tensor]
    apical: list[Tensor]


def record(forward: DensePass, offset: Tensor, controller: PIController, step: TimeStep, steps: int) -> Recording:
    """Simulate the controlled dynamics of one sample, Eq. (1) and (4) of Meulemans et al. (2021), and keep every state.

    Args:
        forward: the sample's forward pass, bound to its feedback weights; B = 1.
        offset: target minus feedforward output, δ_L, (1, n_L).
        controller: the controller.
        step: the discretisation.
        steps: T, the number of steps.
    """
    require(forward.batch_size == 1, "forward", forward.batch_size, "record one sample: forward.samples(...)")
    dynamics = Dynamics(forward, offset, controller, step)
    outputs, controls, somatic, basal, apical = [], [], [], [], []
    for time in range(steps + 1):
        if time:
            dynamics.advance_control()
            dynamics.advance_compartments()
        outputs.append(forward.output + dynamics.rates[-1])
        controls.append(dynamics.u.clone())  # the next step overwrites it
        somatic.append(torch.cat(dynamics.somatic, dim=1))
        basal.append(torch.cat(dynamics.basal, dim=1))
        apical.append(dynamics.stacked_apical.clone())
    compartments = [list(torch.cat(states).split(forward.widths, dim=1)) for states in (somatic, basal, apical)]
    times = step.dt * torch.arange(steps + 1)
    return Recording(times, torch.cat(outputs), (forward.output + offset)[0], torch.cat(controls), *compartments)


@styled
def figure_1d(recording: Recording, layer: int = 2) -> Figure:
    """Output, control and a layer's compartments while the controller acts: Figure 1D of Meulemans et al. (2021).

    The compartments are drawn less their feedforward values, a line for each unit of the layer.

    Args:
        recording: from :func:`record`.
        layer: number of the layer whose compartments are drawn, the first being 1.
    """
    depth = len(recording.somatic)
    require(1 <= layer <= depth, "layer", layer, f"choose one of the network's layers, 1 to {depth}")
    figure, axes = panels(1, 5, width=12, height=2.4)
    output, control, *compartments = axes
    output.plot(recording.time, recording.output, color=BLUE)
    for value in recording.target:
        output.axhline(float(value), color=GREY, linestyle="--")
    output.set_title("output $r_L$, target dashed")
    control.plot(recording.time, recording.control, color=RED)
    control.set_title("control $u$")
    voltages = {
        f"apical $v_{layer}^{{fb}}$": recording.apical,
        rf"basal $v_{layer}^{{ff}}$, change": recording.basal,
        rf"somatic $v_{layer}$, change": recording.somatic,
    }
    for axis, (title, of_layers) in zip(compartments, voltages.items()):
        axis.sharey(compartments[-1])
        axis.plot(recording.time, of_layers[layer - 1], linewidth=1)
        axis.set_title(title)
    for axis in axes:
        axis.set_xlabel(r"time, $\tau_u$")
    return figure
