"""The controlled dynamics of a chain of dense layers, each step in place."""

from __future__ import annotations

import torch
from torch import Tensor

from dfc_lightning.passes.dense import DenseDeviation, DensePass
from dfc_lightning.settling.controller import PIController
from dfc_lightning.settling.dynamics import ControlledDynamics, dynamics_of
from dfc_lightning.settling.time_step import TimeStep


class Dynamics(ControlledDynamics):
    """The state of a chain and its two half steps, :meth:`advance_control` and :meth:`advance_compartments`."""

    def __init__(self, forward: DensePass, offset: Tensor, controller: PIController, step: TimeStep) -> None:
        super().__init__(forward, offset, controller, step)
        self.forward = forward
        self.rates = [torch.zeros_like(v) for v in forward.v]

    def advance_compartments(self, noise: Tensor | None = None) -> None:
        forward, step, weights = self.forward, self.step, self.forward.weights
        self._advance_apical(noise)
        if step.delayed:  # before any rates change, which may be the somatic voltages themselves
            for i in range(1, len(weights)):
                torch.mm(self.rates[i - 1], weights[i].T, out=self.basal[i])
        share = step.somatic_share
        for i, apical in enumerate(self.stacked_apical.split(forward.widths, dim=1)):
            if i and not step.delayed:
                torch.mm(self.rates[i - 1], weights[i].T, out=self.basal[i])
            self.somatic[i].lerp_(apical, share)
            if i:
                self.somatic[i].add_(self.basal[i], alpha=share)
            self.rates[i] = forward.nonlinearities[i].difference(
                forward.v[i], forward.r[i], self.somatic[i], forward.slopes[i]
            )

    def response(self) -> DenseDeviation:
        basal = [self.rates[i - 1] @ w.T if i else self.basal[0] for i, w in enumerate(self.forward.weights)]
        return DenseDeviation(basal, self.driven, list(self.rates), delayed=self.step.delayed)

    def trail(self, driven: bool = True) -> DenseDeviation:
        return DenseDeviation(list(self.basal), self.driven if driven else [], list(self.rates))


@dynamics_of.register
def _(forward: DensePass, offset: Tensor, controller: PIController, step: TimeStep) -> ControlledDynamics:
    return Dynamics(forward, offset, controller, step)
