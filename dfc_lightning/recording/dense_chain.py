"""Is a recorded pass one of dense layers with an elementwise function between each and the next?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dfc_lightning.operations.arguments import writes_into_argument
from dfc_lightning.operations.batch_norm import BatchNorm
from dfc_lightning.operations.layout import FIRST
from dfc_lightning.operations.linear import Same
from dfc_lightning.operations.nonlinearity import Elementwise, Identity, Nonlinearity
from dfc_lightning.operations.operation import Frame, Operation, Slot
from dfc_lightning.operations.passage import Passage
from dfc_lightning.operations.rate import Rate
from dfc_lightning.operations.surrogate import Surrogate, SurrogateRate
from dfc_lightning.passes.record import Record
from dfc_lightning.passes.segment import Segment
from dfc_lightning.recording.composed import composed
from dfc_lightning.recording.structure import Link


def dense_chain(record: Record, frame: Frame) -> list[Link] | None:
    """What lies between the layers of a chain, one link a layer; None if the pass is not one of a chain.

    A chain's operations are a layer, its point, an elementwise function of the voltage alone, and so on; the last
    point is the output.
    """
    found: list[Link] = []
    waiting = list(zip(record.segments, record.passages))
    voltage: Slot | None = None  # of the layer before
    between: list[Operation] = []
    for each in record.program:
        if waiting and each is waiting[0][0].layer:
            segment, passage = waiting[0]
            if not isinstance(segment, Segment) or segment.norm is not None or each.name != "linear":
                return None
            link = Link(Identity(), False) if voltage is None else _link(between, voltage, each.inputs[0], frame)
            if link is None or (voltage is None and between) or not _is_matrix(frame, passage.target):
                return None
            found, between, voltage = [*found, link], [], None
        elif isinstance(each, Passage) and waiting and each is waiting[0][1] and not between:
            waiting, voltage = waiting[1:], each.target
        else:
            between.append(each)
    chained = not waiting and not between and voltage == record.output
    return [*found[1:], Link(Identity(), False)] if chained else None


def _is_matrix(frame: Frame, slot: Slot) -> bool:
    return frame[slot].dim() == 2 and frame.layouts[slot] == FIRST


def _link(between: Sequence[Operation], source: Slot, end: Slot, frame: Frame) -> Link | None:
    """The link made of some operations, if it is an elementwise function of ``source`` alone."""
    known = {source}
    for each in between:
        if not known.issuperset(each.inputs) or isinstance(each, BatchNorm):
            return None
        known.update(each.outputs)
    if end not in known:
        return None
    overwrites = any(writes_into_argument(each.function, each.args, each.kwargs) for each in between)
    if any(isinstance(each, (Surrogate, SurrogateRate)) for each in between):
        return None  # its other arguments, a slope that is annealed say, may be others in the next pass
    making = [each for each in between if not isinstance(each, Same)]
    if not making:
        return Link(Identity(), overwrites)
    if len(making) == 1 and isinstance(making[0], Rate):
        return Link(making[0].phi, overwrites)
    phi = Elementwise(composed(between, source, end, frame.layouts))
    return Link(phi, overwrites) if _is_elementwise(phi, frame[source], frame[end]) else None


def _is_elementwise(phi: Nonlinearity, v: Tensor, r: Tensor) -> bool:
    """φ(v) is r, and an entry of φ(v) depends on nothing but its own entry of v."""
    if v.shape != r.shape:
        return False
    rtol, atol = 1e-4, 1e-6
    for dim, size in enumerate(v.shape):
        place = torch.arange(size, device=v.device).unsqueeze(1 - dim).expand_as(v)
        for bit in range((size - 1).bit_length()):  # two different places differ in one of these
            for keep in (half := (place >> bit) % 2 == 0, ~half):
                moved = phi(torch.where(keep, v, 0.3 - v))
                if not torch.allclose(moved[keep], r[keep], rtol, atol, equal_nan=True):
                    return False
    return True
