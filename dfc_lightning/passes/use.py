"""A use of parameters that is no layer's: tokens, positions, scales, embeddings, weights made of other parameters."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from dfc_lightning.operations.layout import SHARED, Layout
from dfc_lightning.operations.linear import Expand
from dfc_lightning.operations.operation import Frame, Operation, Slot
from dfc_lightning.passes.segment import by_derivative


@dataclass(frozen=True)
class UseSegment:
    """The call in which parameters, or what is made of them alone, meet the samples; its result is the voltage.

    They learn by the derivative of that call and of what leads to it. Of several tensors of samples in the call, what
    is heard is the first; the others are taken as they were feedforward.

    Args:
        call: the call.
        making: the operations, in order, that make what it is given of parameters alone.
        parameters: the parameters in these, each once.
        heard: slot of the first tensor of samples; of the first argument if there is none.
    """

    call: Operation
    making: Sequence[Operation]
    parameters: Sequence[nn.Parameter]
    heard: Slot
    layer: ClassVar[None] = None

    def shift(self, voltage: Tensor) -> Tensor | float:
        """None that is known apart from the rest; see :meth:`Segment.shift`."""
        return 0.0

    def gradients(self, frame: Frame, signal: Tensor, heard: Tensor) -> list[Tensor]:
        """What each of :attr:`parameters` is taught; see :meth:`Segment.gradients`."""

        def voltage(leaves: Sequence[Tensor]) -> Tensor:
            return self._made(frame, heard, {id(p): leaf for p, leaf in zip(self.parameters, leaves)})

        return by_derivative(self.parameters, frame.dtype, signal, voltage)

    def _made(self, frame: Frame, heard: Tensor, instead: Mapping[int, Tensor]) -> Tensor:
        own: dict[int, Tensor] = {}
        if frame.layouts[self.heard] != SHARED:
            own[self.heard] = heard

        def value(slot: Slot) -> Tensor:
            return own[slot] if slot in own else frame[slot]

        for each in self.making:
            own.update(zip(each.outputs, each.at(value, frame.dtype, instead)))
        if isinstance(self.call, Expand):
            return self.call.made(frame, own[self.heard])
        return self.call.at(value, frame.dtype, instead)[0]


def use_segment(
    call: Operation, makers: Mapping[int, Operation], layouts: Sequence[Layout | str], learned: Container[object]
) -> UseSegment:
    """What a call makes of parameters.

    Args:
        call: the call.
        makers: by slot, the operation that made its tensor.
        layouts: by slot.
        learned: the parameters that are to be taught.
    """
    shared: set[Slot] = set()
    waiting = [s for s in call.inputs if layouts[s] == SHARED]
    while waiting:
        slot = waiting.pop()
        if slot not in shared and slot in makers:  # else a mask of dropout
            shared.add(slot)
            waiting.extend(makers[slot].inputs)
    making = list(dict.fromkeys(makers[s] for s in sorted(shared)))
    given = {id(p): p for each in (*making, call) for p in each.parameters if p in learned}
    samples = [s for s in call.inputs if layouts[s] != SHARED]
    return UseSegment(call, making, list(given.values()), (samples or call.inputs)[0])
