"""The controlled dynamics of a network of any shape, as :class:`Dynamics` has them for a chain.

The operations between two control points are instantaneous; a point's soma follows its compartments in time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dfc_lightning.control.controller import PIController
from dfc_lightning.control.graph import Graph
from dfc_lightning.control.operations import Deviations
from dfc_lightning.control.wiring import GraphActivity, GraphResponse
from dfc_lightning.settling.dynamics import ControlledDynamics, TimeStep


class GraphDynamics(ControlledDynamics):
    """The state of a graph; see :class:`ControlledDynamics`.

    ``rates`` holds the deviation of the network's output alone.
    """

    def __init__(
        self, graph: Graph, activity: GraphActivity, offset: Tensor, controller: PIController, step: TimeStep
    ) -> None:
        super().__init__(graph, activity, offset, controller, step)
        self.graph, self.activity = graph, activity
        self.rates = [torch.zeros_like(offset)]
        self._moved: Deviations = [None] * len(activity.frame.values)
        self._arriving = list(self.basal)

    def advance_compartments(self, noise: Tensor | None = None) -> None:
        self._advance_apical(noise)
        driven = self.graph.spread(self.stacked_apical.split(self.graph.widths, dim=1))
        share = 1.0 if self.step.instant_system else self.step.dt / self.step.tau_ratio
        if not self._instant:  # what arrives is what the last step's somata have sent
            self.basal = self._arriving
            self.somatic = [torch.lerp(s, b + a, share) for s, b, a in zip(self.somatic, self.basal, driven)]
        arriving = list(self.basal)

        def at_point(i: int, basal: Tensor | None) -> Tensor:
            arriving[i] = torch.zeros_like(self.somatic[i]) if basal is None else basal
            if self._instant:
                self.somatic[i] = torch.lerp(self.somatic[i], arriving[i] + driven[i], share)
            return self.somatic[i]

        self._moved = self.graph.run(self.activity, at_point)
        self._arriving = arriving
        if self._instant:
            self.basal = arriving
        output = self._moved[self.activity.wiring.output]
        assert output is not None
        self.rates = [output]

    def response(self) -> GraphResponse:
        late = None if self._instant else [now - used for now, used in zip(self._arriving, self.basal)]
        return GraphResponse([], self.driven, self._moved, self.activity.wiring, late)

    def trail(self, driven: bool = True) -> GraphResponse:
        return GraphResponse([], self.driven, self._moved, self.activity.wiring)
