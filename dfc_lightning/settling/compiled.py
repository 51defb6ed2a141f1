"""The controlled dynamics of a chain with its step compiled: few fused kernels in place of many small ones.

The step is written as a function of the state without side effects, which is what torch.compile makes most of. It is
the step of :class:`Dynamics`, in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dfc_lightning.control.chain import Activity, Chain
from dfc_lightning.control.controller import PIController
from dfc_lightning.control.nonlinearity import Nonlinearity
from dfc_lightning.settling.dynamics import Dynamics, TimeStep

State = tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]
"""u_int, u, stacked apical voltages; basal and somatic voltages and rates of each layer."""


class CompiledDynamics(Dynamics):
    """State of a controlled chain; see :class:`Dynamics`. A step is made in :meth:`advance_compartments`."""

    def __init__(
        self, chain: Chain, activity: Activity, offset: Tensor, controller: PIController, step: TimeStep
    ) -> None:
        super().__init__(chain, activity, offset, controller, step)
        self._fixed = (
            offset,
            chain.stacked_feedback.T.contiguous(),
            [w.T for w in chain.weights],
            list(zip(chain.nonlinearities, activity.v, activity.r, activity.slopes)),
            controller,
            step,
        )

    def advance_control(self) -> None:
        """Nothing: the control advances with the compartments."""

    def advance_compartments(self, noise: Tensor | None = None) -> None:
        state = self.u_int, self.u, self.stacked_apical, self.basal, self.somatic, self.rates
        self.u_int, self.u, self.stacked_apical, self.basal, self.somatic, self.rates = _compiled()(
            state, noise, *self._fixed
        )


def _advance(
    state: State,
    noise: Tensor | None,
    offset: Tensor,
    feedback: Tensor,
    weights: Sequence[Tensor],
    units: Sequence[tuple[Nonlinearity, Tensor, Tensor, Tensor]],
    pi: PIController,
    step: TimeStep,
) -> State:
    u_int, before, apical, basal, somatic, rates = state
    error = offset - rates[-1]
    u_int = u_int + step.dt * (error - pi.alpha * (u_int if pi.leak == "integral" else before))
    u = u_int + pi.k_p * error
    drive = (u if step.proactive else before) @ feedback
    apical = drive if step.apical_tau is None else torch.lerp(apical, drive, step.dt / step.apical_tau)
    if noise is not None:
        apical = apical + noise
    instant = step.instant_transmission or step.instant_system
    share = 1.0 if step.instant_system else step.dt / step.tau_ratio
    upstream = list(rates)
    basal, somatic, rates = list(basal), list(somatic), list(rates)
    widths = [v.shape[1] for _, v, _, _ in units]
    for i, (each, (phi, v, r, slope)) in enumerate(zip(apical.split(widths, dim=1), units)):
        if i:
            basal[i] = (rates if instant else upstream)[i - 1] @ weights[i]
        somatic[i] = torch.lerp(somatic[i], each + basal[i], share)
        rates[i] = phi.difference(v, r, somatic[i], slope)
    return u_int, u, apical, basal, somatic, rates


@cache
def _compiled() -> Any:  # at first use: the compiler takes a second to import
    return torch.compile(_advance, dynamic=False)
