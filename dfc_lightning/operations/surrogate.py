"""Calls whose backward is their author's own: straight-through, reversed gradients, surrogates of spikes, quantisation.

What such a function does has no derivative, or another one than was written for it: the change of a step is zero, or a
jump. Its author meant the backward as the derivative, so it is what control sees: deviations pass by the transpose of
how errors come back, and never by the values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dfc_lightning.errors import ControlError
from dfc_lightning.operations.alike import alike
from dfc_lightning.operations.layout import FIRST
from dfc_lightning.operations.nonlinearity import Elementwise
from dfc_lightning.operations.operation import Deviations, Frame, Operation, constant
from dfc_lightning.operations.rate import Rate

_LARGE = 1e3
"""How much larger an error is tried, to see whether the backward clips or normalises what it is given."""


class Surrogate(Operation):
    """A call with a derivative of its own.

    Args:
        name: what the function is called.
        elementwise: whether an entry of its only result hears of nothing but the same entry of its only argument.
    """

    def __init__(self, *args: Any, name: str, elementwise: bool = False) -> None:
        super().__init__(*args)
        self._name, self.elementwise = name, elementwise

    @property
    def name(self) -> str:
        """The name of the function, not of its ``apply``."""
        return self._name

    def deviations(self, frame: Frame, moved: Deviations) -> Sequence[Tensor | None]:
        return self.tangents(frame, moved)

    def tangents(self, frame: Frame, moved: Deviations) -> Sequence[Tensor | None]:
        """The errors that come back are linear in those given; their derivative in these is what goes on."""
        if self.elementwise:
            change = moved[self.inputs[0]]
            assert change is not None
            return [self.slope(frame) * change]
        floats, kept = self._smooth(frame)
        with torch.enable_grad():
            leaves = {s: frame[s].detach().requires_grad_() for s in floats}
            results = self.at(({s: frame[s] for s in self.inputs} | leaves).__getitem__, frame.dtype)
            ends = [k for k in kept if results[k].requires_grad]
            given = [torch.zeros_like(results[k]).requires_grad_() for k in ends]
            back = torch.autograd.grad(
                [results[k] for k in ends], list(leaves.values()), given, create_graph=True, allow_unused=True
            )
            heard = [(b, d) for b, s in zip(back, floats) if b is not None and (d := moved[s]) is not None]
            going = torch.autograd.grad([b for b, _ in heard], given, [d for _, d in heard], allow_unused=True)
        found: list[Tensor | None] = [None] * len(self.outputs)
        for k, change in zip(ends, going):
            found[k] = change
        return found

    def slope(self, frame: Frame) -> Tensor:
        """The derivative of an elementwise function at the frame's values."""

        def make() -> Tensor:
            (found,) = self.pulled(frame, [torch.ones_like(frame[self.outputs[0]])])
            return torch.zeros_like(frame[self.inputs[0]]) if found is None else found

        return frame.once((self, "slope"), make)


class Taught(Elementwise):
    """An elementwise function with a derivative of its own."""

    def difference(self, v: Tensor, r: Tensor, d: Tensor, slope: Tensor | None = None) -> Tensor:
        return (self.slope(v, r) if slope is None else slope) * d


class SurrogateRate(Rate):
    """An elementwise call with a derivative of its own that is nowhere negative: a nonlinearity like others."""

    def __init__(self, call: Surrogate) -> None:
        parts = call.function, call.args, call.kwargs, call.inputs, call.outputs
        super().__init__(*parts, phi=Taught(lambda v: call.at(lambda slot: v, v.dtype)[0]))
        self._name = call.name

    @property
    def name(self) -> str:
        """The name of the function, not of its ``apply``."""
        return self._name


def surrogate(name: str, parts: Sequence[Any], values: Sequence[Tensor]) -> Operation:
    """The operation that a call with a backward of its own is.

    Args:
        name: what the function is called.
        parts: function, arguments, keyword arguments, input and output slots, as of :class:`Operation`.
        values: of all slots.

    Raises:
        ControlError: its backward cannot be followed.
    """
    found = Surrogate(*parts, name=name)
    frame = _frame(found, values)
    try:
        with torch.autocast(values[found.inputs[0]].device.type, enabled=False):
            if values[found.inputs[0]].dtype == frame.dtype:  # autocast has rounded the values
                _check_repeats(found, frame)
            return _examined(found, frame)
    except ControlError:
        raise
    except Exception as error:  # of the user's code
        raise _unfit(name, f"it fails when it is run by itself, or differentiated again ({error})") from error


def _check_repeats(call: Surrogate, frame: Frame) -> None:
    with torch.no_grad():
        again = call.values(frame)
    if not _all_alike([t.double() for t in again], [frame[s].double() for s in call.outputs]):
        raise ControlError(
            f"The function {call.name} gives another result when it is called again, as if it drew random numbers, "
            "which cannot be drawn alike while the network settles. Use nn.Dropout, whose masks are kept, or draw "
            "them outside and hand them to it."
        )


def _examined(call: Surrogate, frame: Frame) -> Operation:
    generator = torch.Generator().manual_seed(0)

    def drawn(slots: Sequence[int]) -> list[Tensor | None]:
        like = [frame[s] if frame[s].is_floating_point() else None for s in slots]
        return [None if v is None else torch.randn(v.shape, generator=generator).to(v) for v in like]

    def scaled(tensors: Sequence[Tensor | None], factor: float) -> list[Tensor | None]:
        return [None if t is None else t * factor for t in tensors]

    errors = drawn(call.outputs)
    back = call.pulled(frame, errors)
    if not _all_alike(call.pulled(frame, scaled(errors, _LARGE)), scaled(back, _LARGE)):
        raise _unfit(call.name, "it is not linear in the gradient that it is given")
    one = len(call.inputs) == len(call.outputs) == 1 and frame[call.inputs[0]].shape == frame[call.outputs[0]].shape
    if one and errors[0] is not None and _all_alike(back, [call.slope(frame) * errors[0]]):
        call.elementwise = True
        return SurrogateRate(call) if call.slope(frame).min() >= 0 else call
    half = [None if e is None else torch.cat([e[: len(e) // 2], torch.zeros_like(e[len(e) // 2 :])]) for e in errors]
    if any(b is not None and b[len(b) // 2 :].any() for b in call.pulled(frame, half)):
        raise _unfit(call.name, "it lets samples hear of each other's gradients")
    changes = drawn(call.inputs)
    moved: Deviations = [None] * len(frame.values)
    for slot, change in zip(call.inputs, changes):
        moved[slot] = change
    if not any(b is not None for b in back):
        return call  # a derivative of none: what it cuts off is noticed as other cuts are
    if not torch.isclose(_inner(call.tangents(frame, moved), errors), _inner(back, changes), 1e-3, 1e-3):
        raise _unfit(call.name, "it cannot be differentiated again")
    return call


def _frame(call: Operation, values: Sequence[Tensor]) -> Frame:
    """The values of a call's own slots, in full precision."""
    used = {*call.inputs, *call.outputs}
    dtype = torch.promote_types(next(values[s].dtype for s in call.inputs), torch.float32)
    own = [constant(v, dtype) if k in used else None for k, v in enumerate(values)]
    return Frame(own, values[call.inputs[0]].shape[0], dtype, [FIRST] * len(own))


def _all_alike(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> bool:
    return all(
        (a is None and b is None) or (a is not None and b is not None and alike(a, b, 1e-4, 1e-5))
        for a, b in zip(found, expected)
    )


def _inner(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b) if x is not None and y is not None]).sum().cpu()


def _unfit(name: str, why: str) -> ControlError:
    return ControlError(
        f"The function {name} has a backward of its own that cannot be followed: {why}. Under control the backward is "
        "the function's derivative, for each sample by itself. Write it in torch's functions, linear in the gradient "
        "and without once_differentiable, or freeze the layers before it with requires_grad_(False)."
    )
