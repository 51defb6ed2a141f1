"""The points of a graph as feedback learning sees them: layers of a chain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dfc_lightning.control.wiring import GraphActivity

if TYPE_CHECKING:
    from dfc_lightning.control.graph import Graph


class Layered:
    """The points of a graph grouped by the somata between them and the output, as if they were layers of a chain.

    To feedback learning a network is J_i and Q_i, and the number of somata that filter a layer's noise on its way to
    the output: on the longest way, where there are several.

    Args:
        graph: the graph.
        activity: a feedforward pass.
    """

    reducible = False

    def __init__(self, graph: Graph, activity: GraphActivity) -> None:
        self.graph, self.activity = graph, activity
        ways = activity.wiring.somata_to_output
        self.groups = [[i for i, n in enumerate(ways) if n == count] for count in range(max(ways), 0, -1)]
        self.depth = len(self.groups)
        self.feedback = [torch.cat([graph.feedback[i] for i in group]) for group in self.groups]
        self.widths = [q.shape[0] for q in self.feedback]

    def jacobians(self, activity: object) -> list[Tensor]:
        """J of each group, one (B, n_L, n) each."""
        found = self.graph.jacobians(self.activity)
        return [torch.cat([found[i] for i in group], dim=2) for group in self.groups]

    def slopes(self, activity: GraphActivity) -> list[Tensor]:
        """Largest φ' among the units that a port drives, one (B, n) a group."""
        found = []
        for slope, spread, shape in zip(activity.slopes, self.graph.spreads, self.graph.shapes):
            shared = [k + 1 for k, (one, n) in enumerate(zip(spread, shape)) if one != n]
            found.append((slope.abs().amax(shared) if shared else slope).flatten(1))
        return [torch.cat([found[i] for i in group], dim=1) for group in self.groups]

    def of_points(self, grouped: Sequence[Any]) -> list[Any]:
        """What each point's group has, point by point."""
        found = {i: value for group, value in zip(self.groups, grouped) for i in group}
        return [found[i] for i in range(self.graph.depth)]

    def together(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What is for the points, as it is for the groups."""
        return [torch.cat([tensors[i] for i in group]) for group in self.groups]

    def apart(self, grouped: Sequence[Tensor]) -> list[Tensor]:
        """What is for the groups, as it is for the points."""
        found: dict[int, Tensor] = {}
        for group, tensor in zip(self.groups, grouped):
            found |= zip(group, tensor.split([self.graph.widths[i] for i in group]))
        return [found[i] for i in range(self.graph.depth)]
