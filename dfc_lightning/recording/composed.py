"""Elementwise functions made of several operations: h σ(h), a slope on one side of zero, tanh and then softplus."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from dfc_lightning.operations.layout import SHARED, Layout
from dfc_lightning.operations.linear import Product, Reshape, Same, Sum, two
from dfc_lightning.operations.nonlinearity import Elementwise
from dfc_lightning.operations.operation import Frame, Operation, Slot
from dfc_lightning.operations.rate import Rate
from dfc_lightning.operations.surrogate import Surrogate, SurrogateRate

_SHAPES = {"squeeze", "unsqueeze"}
_QUOTIENTS = {"div", "__div__", "__truediv__", "__itruediv__", "true_divide", "divide"}
_OF_ONE = {"neg", "abs", "square", "sqrt", "rsqrt", "reciprocal", "log", "log1p", "log2", "expm1", "cos", "atan", "erf"}
_OF_ONE |= {
    "sign",
    "prelu",
    "threshold",
    "clamp",
    "clip",
    "clamp_min",
    "clamp_max",
    "masked_fill",
    "pow",
    "cosh",
    "sinh",
}
_OF_MORE = {"where", "__neg__", "__pow__", "__rpow__", "__rdiv__", "__rtruediv__", "rsub", "__rsub__"}
_OF_MORE |= {"mul", "__mul__", "__rmul__", "mul_", "__imul__"}  # by a mask: others are known as products
_OF_MORE |= {"maximum", "minimum", "max", "min", "lerp", "float_power"}
_MASKS = {"gt", "ge", "lt", "le", "eq", "ne", "__gt__", "__ge__", "__lt__", "__le__", "__eq__", "__ne__"}
_MASKS |= {"logical_and", "logical_or", "logical_not", "__and__", "__or__", "__invert__", "float", "double", "to"}
ELEMENTWISE = _SHAPES | _QUOTIENTS | _OF_ONE | {f"{name}_" for name in (*_OF_ONE, "div")} | _OF_MORE | _MASKS
"""Functions that work entry by entry where they keep the number of entries, by their names in torch."""


def composed(
    between: Sequence[Operation], source: Slot, end: Slot, layouts: Sequence[Layout]
) -> Callable[[Tensor], Tensor]:
    """The function that some operations, in order, make of ``source``, the samples lying where ``layouts`` says."""
    size = 1 + max(int(s) for s in (source, *(s for each in between for s in each.outputs)))
    given = layouts[source]

    def run(v: Tensor) -> Tensor:
        batch = 1 if given == SHARED else v.shape[given.dim] // (given.before * given.rows)
        frame = Frame([None] * size, batch, v.dtype, layouts[:size])
        frame.values[source] = v
        for each in between:
            for slot, value in zip(each.outputs, each.values(frame)):
                frame.values[slot] = value
        return frame[end]

    return run


def rate_of(source: Slot, users: Mapping[int, Sequence[Operation]], frame: Frame) -> Rate | None:
    """What becomes of a tensor by elementwise operations alone, if all that hears it hears the result of these.

    A single nonlinearity is found as it is; several operations are one function, known by its values.
    """
    between = _region(source, users, frame)
    made = {s: each for each in between for s in each.outputs}
    heard = [s for s in (source, *made) if s not in users or any(each not in between for each in users[s])]
    if len(heard) != 1 or heard[0] == source:
        return None
    end = heard[0]
    while frame[end].shape != frame[source].shape:  # a change of shape at the end is no part of it
        last = made.get(end)
        if last is None or not _shapes(last) or len(users[last.inputs[0]]) > 1:
            return None
        between, end = [each for each in between if each is not last], last.inputs[0]
    making = [each for each in between if not isinstance(each, Same) and not _shapes(each)]
    first = making[0] if making else None
    alone = len(making) == 1 or any(isinstance(each, (Surrogate, SurrogateRate)) for each in making)
    if alone and isinstance(first, Rate) and first.inputs[0] == source:
        return first  # a function with a derivative of its own is no part of another that is known by its values
    if any(isinstance(each, (Surrogate, SurrogateRate)) for each in making):
        return None
    if not making:
        return None
    function = Elementwise(composed(between, source, end, frame.layouts))
    return Rate(function, [source], {}, [source], [end], phi=function)


def is_bent(rate: Rate, users: Mapping[int, Sequence[Operation]], frame: Frame) -> bool:
    """Whether what :func:`rate_of` has found is more than a scale and a shift."""
    return not all(_straight(each) for each in _region(rate.inputs[0], users, frame))


def _region(source: Slot, users: Mapping[int, Sequence[Operation]], frame: Frame) -> list[Operation]:
    """The operations, in order, that work entry by entry on ``source`` and on what these have made of it."""
    known, found, waiting = {source}, [], [source]
    entries = frame[source].numel()
    while waiting:
        for each in users.get(waiting.pop(), ()):
            if each not in found and known.issuperset(each.inputs) and _by_entries(each, frame, entries):
                found.append(each)
                known.update(each.outputs)
                waiting.extend(each.outputs)
    return sorted(found, key=lambda each: each.outputs[0])


def _by_entries(each: Operation, frame: Frame, entries: int) -> bool:
    if len(each.outputs) != 1 or frame[each.outputs[0]].numel() != entries:
        return False
    if each.name == "with_item":  # h[mask] = number
        return each.args[1] in each.inputs and not isinstance(each.args[2], Tensor)
    return isinstance(each, (Rate, Same, Reshape, Sum, Product)) or each.name in ELEMENTWISE


def _shapes(each: Operation) -> bool:
    return isinstance(each, Reshape) or each.name in _SHAPES


def _straight(each: Operation) -> bool:
    if isinstance(each, (Same, Sum)) or _shapes(each) or each.name in ("neg", "__neg__"):
        return True
    if isinstance(each, Product) or each.name in _QUOTIENTS:
        first, second = two(each.args, each.kwargs)
        return not (isinstance(first, Slot) and isinstance(second, Slot))
    return False
