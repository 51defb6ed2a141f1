"""What a forward pass of a network of any shape did, from the layers' inputs to the network's output."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from dfc_lightning.operations.max_pool import MaxPool
from dfc_lightning.operations.nonlinearity import Nonlinearity
from dfc_lightning.operations.operation import Frame, Operation, Slot
from dfc_lightning.operations.passage import Passage
from dfc_lightning.operations.rate import Rate
from dfc_lightning.passes.segment import NamedSegment, Segment
from dfc_lightning.passes.use import UseSegment


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
class Record:
    """The operations of a pass, and where its control points lie.

    Args:
        program: the operations, in order.
        segments: the layer, and the normalisation, of each control point.
        passages: where each point lies.
        sites: its nonlinearity.
        output: slot of the network's output.
    """

    program: Sequence[Operation]
    segments: Sequence[Segment | NamedSegment | UseSegment]
    passages: Sequence[Passage]
    sites: Sequence[Site]
    output: Slot

    @cached_property
    def somata(self) -> list[int]:
        """The number of points on the longest way from each point, itself included, to the output."""
        longest: dict[int, int] = {self.output: 0}
        for each in reversed(self.program):
            here = max((longest[s] for s in each.outputs if s in longest), default=None)
            if here is not None:
                for s in each.inputs:
                    longest[s] = max(longest.get(s, 0), here + isinstance(each, Passage))
        return [longest.get(p.target, 0) + 1 for p in self.passages]

    @cached_property
    def moving(self) -> set[int]:
        """The slots that depend on a point."""
        return self._after(p.target for p in self.passages)

    @cached_property
    def tail(self) -> set[int]:
        """The slots that depend on a point that is the output."""
        return self._after(p.target for p, count in zip(self.passages, self.somata) if count == 1)

    def _after(self, slots: Iterable[Slot]) -> set[int]:
        found = set(map(int, slots))
        for each in self.program:
            if found.intersection(each.inputs):
                found.update(map(int, each.outputs))
        return found

    @cached_property
    def used(self) -> set[int]:
        """All slots that a pass under control looks at."""
        found = {int(self.output), *(int(s.heard) for s in self.segments)}
        for each in self.program:
            found.update(map(int, (*each.inputs, *each.outputs)))
        return found

    def again(self, frame: Frame) -> Frame:
        """The program's values for the same input, as its weights are now."""
        found = replace(frame, values=list(frame.values), derived={})
        for each in self.program:
            for slot, value in zip(each.outputs, each.values(found)):
                found.values[slot] = value
        return found

    def samples(self, frame: Frame, index: torch.Tensor) -> Frame:
        """The values of some samples only."""
        values = [
            layout.samples(v, index) if k in self.used and v is not None else None
            for k, (v, layout) in enumerate(zip(frame.values, frame.layouts))
        ]
        batch = len(torch.arange(frame.batch, device=index.device)[index])
        return replace(frame, values=values, batch=batch, derived={})


def finest(frame: Frame, program: Sequence[Operation]) -> Frame:
    """Take the rows that samples have throughout for samples: tokens, say, that are in the batch all along."""
    used = {int(s) for each in program for s in (*each.inputs, *each.outputs)}
    rows = math.gcd(*(frame.layouts[s].rows for s in used))
    if rows == 1:
        return frame
    layouts = [each._replace(rows=each.rows // rows) if s in used else each for s, each in enumerate(frame.layouts)]
    return replace(frame, batch=frame.batch * rows, layouts=layouts)
