"""Does an error come back from the output to each control point? Where none can, nothing would be learned."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dfc_lightning.errors import ControlError
from dfc_lightning.operations.operation import Deviations, Frame, Operation
from dfc_lightning.passes.record import Record


def check_errors_come_back(record: Record, frame: Frame, names: Sequence[str]) -> None:
    """See that a way that can be differentiated leads from the output back to each point.

    A derivative that is zero, such as that of rounding, is one.

    Args:
        record: a pass.
        frame: its values.
        names: of its points.

    Raises:
        ControlError: there is none.
    """
    ends_of_batch = torch.tensor(sorted({0, frame.batch - 1}), device=frame[record.output].device)
    few = record.samples(frame, ends_of_batch)
    reached: Deviations = [None] * len(frame.values)
    reached[record.output] = torch.ones_like(few[record.output])
    for each in reversed(record.program):
        ends = [None if reached[s] is None else torch.ones_like(few[s]) for s in each.outputs]
        if record.moving.isdisjoint(each.inputs) or all(e is None for e in ends):
            continue
        try:
            shares = each.pulled(few, ends)
        except RuntimeError as error:
            raise ControlError(
                f"No error comes back through {each.name}: {error}. Use something that has a derivative, or freeze the "
                "layers before it with requires_grad_(False)."
            ) from error
        for slot, share in zip(each.inputs, shares):
            if share is not None:
                reached[slot] = share
    for name, passage in zip(names, record.passages):
        if reached[passage.target] is None:
            cut = _cut_at(record, few, reached, passage.target)
            raise ControlError(
                f"No error comes back to the layer {name!r}: all that it sends on goes through {cut}, which has no "
                "derivative. Use something that has one, an autograd.Function with a backward of its own, say, or "
                "freeze the layers before it with requires_grad_(False)."
            )


def _cut_at(record: Record, frame: Frame, reached: Deviations, start: int) -> str:
    """The first operation after a slot that lets no error through."""
    makers = {int(s): each for each in record.program for s in each.outputs}
    after = {int(start)}
    for each in record.program:
        heard = [s for s in each.inputs if s in after]
        if heard and any(reached[s] is not None for s in each.outputs):
            return _named(each, heard[0], frame, makers)
        if heard:
            after.update(map(int, each.outputs))
    return "an operation"


def _named(each: Operation, heard: int, frame: Frame, makers: dict[int, Operation]) -> str:
    """What has made numbers that are no floats, if they are none, else what has been given floats in vain."""
    while not frame[heard].is_floating_point():
        each = makers[heard]
        heard = each.inputs[0]
    described = getattr(each.function, "__self__", None) if each.name == "__get__" else None  # of an attribute
    return getattr(described, "__name__", each.name)
