"""What a forward pass of a network of any shape did, with what values, and how its control changes these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dfc_lightning.control.nonlinearity import Nonlinearity
from dfc_lightning.control.operations import Deviations, Frame, Operation, Rate, Slot
from dfc_lightning.control.pooling import MaxPool
from dfc_lightning.control.segments import NamedSegment, Segment
from dfc_lightning.control.tape import Passage


@dataclass(frozen=True)
class Site:
    """Where a point's voltage becomes a rate.

    Args:
        phi: the nonlinearity; the identity where a point has none of its own.
        operation: where it is recorded, its argument being the voltage, or a sum of the voltage with another branch;
            None for one that is taken of the voltage itself.
        pool: the max-pooling just before or after it: of the units in a window only the most active one has a rate.
    """

    phi: Nonlinearity
    operation: Rate | None = None
    pool: MaxPool | None = None


@dataclass(frozen=True)
class Wiring:
    """What a forward pass did, from the layers' inputs to the network's output.

    Args:
        program: the operations, in order.
        segments: the layer, and the normalisation, of each control point.
        passages: where each point lies.
        sites: its nonlinearity.
        output: slot of the network's output.
    """

    program: Sequence[Operation]
    segments: Sequence[Segment | NamedSegment]
    passages: Sequence[Passage]
    sites: Sequence[Site]
    output: Slot

    @cached_property
    def somata_to_output(self) -> list[int]:
        """The number of points on the longest way from each point, itself included, to the output."""
        longest: dict[int, int] = {self.output: 0}
        for each in reversed(self.program):
            here = max((longest[s] for s in each.outputs if s in longest), default=None)
            if here is not None:
                for s in each.inputs:
                    longest[s] = max(longest.get(s, 0), here + isinstance(each, Passage))
        return [longest.get(p.target, 0) + 1 for p in self.passages]

    def again(self, frame: Frame) -> Frame:
        """The program's values for the same input, as its weights are now."""
        found = Frame(list(frame.values), frame.batch, frame.dtype)
        for each in self.program:
            for slot, value in zip(each.outputs, each.values(found)):
                found.values[slot] = value
        return found


@dataclass
class GraphActivity:
    """One feedforward pass over a batch of B samples.

    Args:
        wiring: what was done.
        frame: with what values.
    """

    wiring: Wiring
    frame: Frame

    @property
    def batch_size(self) -> int:
        """B."""
        return self.frame.batch

    @property
    def output(self) -> Tensor:
        """The network's output r_L⁻, (B, n_L)."""
        return self.frame[self.wiring.output]

    @property
    def v(self) -> list[Tensor]:
        """Feedforward voltages v_i⁻ of the control points, (B, …)."""
        return [self.frame[p.target] for p in self.wiring.passages]

    @property
    def slopes(self) -> list[Tensor]:
        """φ' at each point's site, in the shape of its voltage; zero for a unit that loses in max-pooling."""
        found = []
        for site, v in zip(self.wiring.sites, self.v):
            slope = site.phi.slope(v, site.phi(v)) if site.operation is None else site.operation.slope(self.frame)
            found.append(slope if site.pool is None else slope * site.pool.wins(self.frame))
        return found

    def presynaptic(self) -> list[Tensor]:
        """What each layer multiplies with its weights, (B, …)."""
        return [self.frame[s.heard] for s in self.wiring.segments]

    def samples(self, index: Tensor) -> GraphActivity:
        """The activity of some samples only; ``index`` as for a tensor's first dimension."""
        used = {self.wiring.output, *(s.heard for s in self.wiring.segments)}
        for each in self.wiring.program:
            used.update(each.inputs, each.outputs)
        values = [v[index] if k in used and v is not None else None for k, v in enumerate(self.frame.values)]
        output = values[self.wiring.output]
        assert output is not None
        return GraphActivity(self.wiring, Frame(values, output.shape[0], self.frame.dtype))


@dataclass
class GraphResponse:
    """How the controlled network deviates from feedforward.

    Args:
        ports: what drives each point, Q_i u, (B, n_i).
        driven: the same in the shape of the voltage.
        moved: every deviation, by slot.
        wiring: what the slots are.
        late: what has arrived at each point by now, less what has arrived when its soma last moved; None where
            transmission is instantaneous.
    """

    ports: list[Tensor]
    driven: list[Tensor]
    moved: Deviations
    wiring: Wiring
    late: list[Tensor] | None = None

    @property
    def output(self) -> Tensor:
        """δr_L, (B, n_L)."""
        found = self.moved[self.wiring.output]
        assert found is not None
        return found

    @property
    def basal(self) -> list[Tensor]:
        """δv_i^ff, what the layer's own input drives it to."""
        arriving = (self.moved[p.source] for p in self.wiring.passages)
        return [torch.zeros_like(d) if b is None else b for b, d in zip(arriving, self.driven)]

    def where(self, keep: Tensor, other: GraphResponse | None = None) -> GraphResponse:
        """This response for the samples of the mask ``keep``, (B,); ``other``, or no deviation, for the rest."""

        def choose(mine: Sequence[Tensor | None], others: Sequence[Tensor | None] | None) -> list:
            if others is None:
                others = [None] * len(mine)
            return [_where(keep, a, b) for a, b in zip(mine, others)]

        return GraphResponse(
            choose(self.ports, None if other is None else other.ports),
            choose(self.driven, None if other is None else other.driven),
            choose(self.moved, None if other is None else other.moved),
            self.wiring,
            None if self.late is None else choose(self.late, None if other is None else other.late),
        )


def _where(keep: Tensor, mine: Tensor | None, other: Tensor | None) -> Tensor | None:
    if mine is None:
        return None
    other = torch.zeros_like(mine) if other is None else other
    return torch.where(keep.view(-1, *[1] * (mine.dim() - 1)), mine, other)
