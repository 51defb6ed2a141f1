"""The controlled dynamics of a network of any shape, as :class:`Dynamics` has them for a chain.

The operations between two control points are instantaneous; a point's soma follows its compartments in time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dfc_lightning.operations.operation import Deviations
from dfc_lightning.passes.recorded import RecordedPass
from dfc_lightning.passes.recorded_deviation import RecordedDeviation
from dfc_lightning.settling.controller import PIController
from dfc_lightning.settling.dynamics import ControlledDynamics, dynamics_of
from dfc_lightning.settling.time_step import TimeStep


class RecordedDynamics(ControlledDynamics):
    """The state of a recorded network; see :class:`ControlledDynamics`.

    ``rates`` holds the deviation of the network's output alone.
    """

    def __init__(self, forward: RecordedPass, offset: Tensor, controller: PIController, step: TimeStep) -> None:
        super().__init__(forward, offset, controller, step)
        self.forward = forward
        self.rates = [torch.zeros_like(offset)]
        self._moved: Deviations = [None] * len(forward.frame.values)
        self._arriving = list(self.basal)

    def advance_compartments(self, noise: Tensor | None = None) -> None:
        self._advance_apical(noise)
        driven = self.forward.spread(self.stacked_apical.split(list(self.forward.widths), dim=1))
        share, delayed = self.step.somatic_share, self.step.delayed
        if delayed:  # what arrives is what the last step's somata have sent
            self.basal = self._arriving
            self.somatic = [torch.lerp(s, b + a, share) for s, b, a in zip(self.somatic, self.basal, driven)]
        arriving = list(self.basal)

        def at_point(i: int, basal: Tensor | None) -> Tensor:
            arriving[i] = torch.zeros_like(self.somatic[i]) if basal is None else basal
            if not delayed:
                self.somatic[i] = torch.lerp(self.somatic[i], arriving[i] + driven[i], share)
            return self.somatic[i]

        self._moved = self.forward.run(at_point)
        self._arriving = arriving
        if not delayed:
            self.basal = arriving
        self.rates = [self.response().output]

    def response(self) -> RecordedDeviation:
        late = [now - used for now, used in zip(self._arriving, self.basal)] if self.step.delayed else None
        return RecordedDeviation(self.driven, self._moved, self.forward.record, self.forward.frame.layouts, late)

    def trail(self, driven: bool = True) -> RecordedDeviation:
        return RecordedDeviation(self.driven, self._moved, self.forward.record, self.forward.frame.layouts)


@dynamics_of.register
def _(forward: RecordedPass, offset: Tensor, controller: PIController, step: TimeStep) -> ControlledDynamics:
    return RecordedDynamics(forward, offset, controller, step)
