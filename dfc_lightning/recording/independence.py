"""Do samples keep apart? Control settles each by itself."""

from __future__ import annotations

import torch

from dfc_lightning.errors import ControlError
from dfc_lightning.operations.alike import alike
from dfc_lightning.operations.operation import Frame, constant
from dfc_lightning.passes.record import Record
from dfc_lightning.passes.segment import NamedSegment
from dfc_lightning.recording.slots import entangled


def check_samples_are_independent(record: Record, frame: Frame) -> None:
    """See that each operation of a pass gives some samples what it gave them among all.

    Raises:
        ControlError: it does not: samples depend on each other, or on their place in the batch.
    """
    some = record.samples(frame, torch.arange(0, frame.batch, 2, device=frame[record.output].device))
    rtol = 1e-3 if frame.dtype == torch.float32 else 1e-8
    for each in record.program:
        try:
            values = each.values(some)
        except (RuntimeError, ValueError, IndexError) as error:
            raise entangled(each.name, f"with some samples only it ends in {error}") from error
        for slot, value in zip(each.outputs, values):
            if value.shape != some[slot].shape or not alike(value, some[slot], rtol, rtol):
                raise entangled(each.name, "made again with some samples only, it gave them other values")


def check_named_modules_repeat(record: Record, frame: Frame) -> None:
    """See that modules controlled as a whole give the same again, as their update has it.

    Raises:
        ControlError: one does not.
    """
    rtol = 1e-3 if frame.dtype == torch.float32 else 1e-8
    for segment, passage in zip(record.segments, record.passages):
        if isinstance(segment, NamedSegment):
            parameters = [constant(p, frame.dtype) for p in segment.parameters]
            if not alike(segment.again(frame, frame[segment.heard], parameters), frame[passage.source], rtol, rtol):
                raise ControlError(
                    f"The module {type(segment.module).__name__} that is named in extra_points gives another result "
                    "when it is called again with the same input. Its update needs the same: keep what changes in "
                    "buffers, take random numbers other than those of nn.Dropout out, or freeze it with "
                    "requires_grad_(False)."
                )
