"""How an operation between two control points passes deviations on.

With x⁻ the feedforward value of its argument and δ what the control adds to it, an operation f has to give
f(x⁻ + δ) − f(x⁻) without losing the digits of a small δ. Linear operations are applied to δ itself, elementwise
nonlinearities have differences of their own (:mod:`.nonlinearity`), batch normalisation is an affine map with the
statistics of the feedforward pass, and everything else is subtracted in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dfc_lightning.control.nonlinearity import Nonlinearity


class Slot(int):
    """The place of a recorded tensor among the values of a pass."""


@dataclass
class Frame:
    """The values of one feedforward pass over B samples, by slot, and what is derived from them.

    Args:
        values: the value of each slot that the program uses, else None.
        batch: B.
        dtype: of the values.
    """

    values: list[Tensor | None]
    batch: int
    dtype: torch.dtype
    derived: dict[Any, Any] = field(default_factory=dict)

    def __getitem__(self, slot: int) -> Tensor:
        value = self.values[slot]
        assert value is not None
        return value

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` returns, made at the first call for ``key``."""
        if key not in self.derived:
            self.derived[key] = make()
        return self.derived[key]


Deviations = list["Tensor | None"]
"""By slot; None where the control changes nothing."""


class Operation:
    """A recorded call, to be made again with other tensors.

    Args:
        function: what was called.
        args: its positional arguments, recorded tensors replaced by their slots.
        kwargs: its keyword arguments, likewise.
        inputs: the slots in these.
        outputs: slots of the tensors it returned.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        inputs: list[Slot],
        outputs: list[Slot],
    ) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs
        self.inputs, self.outputs = inputs, outputs

    @property
    def name(self) -> str:
        """The name of what was called."""
        return getattr(self.function, "__name__", str(self.function))

    def values(self, frame: Frame) -> Sequence[Tensor]:
        """The operation at a frame's values."""
        return self.at(lambda slot: frame[slot], frame.dtype)

    def tangents(self, frame: Frame, moved: Deviations) -> Sequence[Tensor | None]:
        """The same to first order."""
        floats = [s for s in self.inputs if frame[s].is_floating_point()]
        kept = [k for k, s in enumerate(self.outputs) if frame[s].is_floating_point()]
        found: list[Tensor | None] = [None] * len(self.outputs)
        if not floats or not kept:
            return found

        def run(*values: Tensor) -> tuple[Tensor, ...]:
            given = {s: frame[s] for s in self.inputs} | dict(zip(floats, values))
            results = self.at(given.__getitem__, frame.dtype)
            return tuple(results[k] for k in kept)

        changes = [torch.zeros_like(frame[s]) if (d := moved[s]) is None else d for s in floats]
        for k, change in zip(kept, torch.func.jvp(run, tuple(frame[s] for s in floats), tuple(changes))[1]):
            found[k] = change
        return found

    def deviations(self, frame: Frame, moved: Deviations) -> Sequence[Tensor | None]:
        """The change of its results, one an output, when its inputs change by ``moved``.

        Of numbers that are no floats, such as masks and indices, it is not the change that moves on but the new value.
        """
        wide = {s: constant(frame[s], torch.float64) for s in self.inputs}
        before = frame.once(self, lambda: self.at(wide.__getitem__, torch.float64))
        for slot in self.inputs:
            if (change := moved[slot]) is not None:
                wide[slot] = wide[slot] + change.double() if wide[slot].is_floating_point() else change
        after = self.at(wide.__getitem__, torch.float64)
        return [
            (a - b).to(frame[slot].dtype) if a.is_floating_point() else a
            for a, b, slot in zip(after, before, self.outputs)
        ]

    def at(self, value: Callable[[Slot], Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
        """The operation with other values in its slots."""
        args, kwargs = _filled((self.args, self.kwargs), value, dtype)
        if writes_into_argument(self.function, args, kwargs):
            if args:
                args = [args[0].clone(), *args[1:]]
            else:
                kwargs = {**kwargs, "input": kwargs["input"].clone()}
        return tensors_of(self.function(*args, **kwargs))


class Exact(Operation):
    """An operation that is linear in what moves."""

    def tangents(self, frame: Frame, moved: Deviations) -> Sequence[Tensor | None]:
        return self.deviations(frame, moved)


class Linear(Exact):
    """Linear in its only tensor or tensors, such as pooling by averages, or taken apart and put together."""

    def deviations(self, frame: Frame, moved: Deviations) -> Sequence[Tensor | None]:
        def change(slot: Slot) -> Tensor:
            found, value = moved[slot], frame[slot]
            if found is not None:
                return found
            return torch.zeros_like(value) if value.is_floating_point() else value

        args, kwargs = _filled((self.args, self.kwargs), change, frame.dtype, still=True)
        return tensors_of(self.function(*args, **kwargs))


class Reshape(Exact):
    """Samples keep apart, in whatever shape; the recorded shape holds for any number of them."""

    def __init__(self, *args: Any, shape: Sequence[int]) -> None:
        super().__init__(*args)
        self.shape = tuple(shape[1:])

    def values(self, frame: Frame) -> Sequence[Tensor]:
        return [self._reshaped(frame[self.inputs[0]])]

    def deviations(self, frame: Frame, moved: Deviations) -> Sequence[Tensor | None]:
        change = moved[self.inputs[0]]
        assert change is not None
        return [self._reshaped(change)]

    def _reshaped(self, value: Tensor) -> Tensor:
        return value.reshape(value.shape[0], *self.shape)


class Expand(Reshape):
    """The same along new or single positions, for any number of samples."""

    def _reshaped(self, value: Tensor) -> Tensor:
        return value.expand(value.shape[0], *self.shape)


class Same(Exact):
    """Hands its tensor on as it is: casts, and copies."""

    def values(self, frame: Frame) -> Sequence[Tensor]:
        return [frame[self.inputs[0]]]

    def deviations(self, frame: Frame, moved: Deviations) -> Sequence[Tensor | None]:
        return [moved[self.inputs[0]]]


class Weighted(Exact):
    """A linear or convolutional layer: its bias does not pass deviations."""

    def deviations(self, frame: Frame, moved: Deviations) -> Sequence[Tensor | None]:
        names = dict(zip(("input", "weight", "bias"), self.args)) | self.kwargs
        rest = {name: value for name, value in self.kwargs.items() if name not in ("input", "weight", "bias")}
        weight = constant(names["weight"], frame.dtype)
        return [self.function(moved[self.inputs[0]], weight, None, *self.args[3:], **rest)]


class Sum(Exact):
    """x + y and x − y."""

    def __init__(self, *args: Any, sign: int) -> None:
        super().__init__(*args)
        self.scale = sign * self.kwargs.get("alpha", 1)

    def deviations(self, frame: Frame, moved: Deviations) -> Sequence[Tensor | None]:
        first, second = (moved[a] if isinstance(a, Slot) else None for a in _two(self.args, self.kwargs))
        shape = frame[self.outputs[0]].shape
        if second is None:
            assert first is not None
            return [first.expand(shape)]
        if first is None:
            return [(second * self.scale).expand(shape)]
        return [torch.add(first, second, alpha=self.scale)]


class Product(Operation):
    """x y: δx y⁻ + (x⁻ + δx) δy."""

    def tangents(self, frame: Frame, moved: Deviations) -> Sequence[Tensor | None]:
        return self._changes(frame, moved, 0.0)

    def deviations(self, frame: Frame, moved: Deviations) -> Sequence[Tensor | None]:
        return self._changes(frame, moved, 1.0)

    def _changes(self, frame: Frame, moved: Deviations, second_order: float) -> Sequence[Tensor | None]:
        (x, dx), (y, dy) = (
            (frame[a], moved[a]) if isinstance(a, Slot) else (a, None) for a in _two(self.args, self.kwargs)
        )
        if dy is None:
            assert dx is not None
            return [dx * y]
        if dx is None:
            return [x * dy]
        return [dx * y + (x + second_order * dx) * dy]


class Rate(Operation):
    """An elementwise nonlinearity φ.

    Args:
        phi: φ.
    """

    def __init__(self, *args: Any, phi: Nonlinearity) -> None:
        super().__init__(*args)
        self.phi = phi

    def values(self, frame: Frame) -> Sequence[Tensor]:
        return [self.phi(frame[self.inputs[0]])]

    def deviations(self, frame: Frame, moved: Deviations) -> Sequence[Tensor | None]:
        source = self.inputs[0]
        change = moved[source]
        assert change is not None
        return [self.phi.difference(frame[source], frame[self.outputs[0]], change, self.slope(frame))]

    def tangents(self, frame: Frame, moved: Deviations) -> Sequence[Tensor | None]:
        change = moved[self.inputs[0]]
        assert change is not None
        return [self.slope(frame) * change]

    def slope(self, frame: Frame) -> Tensor:
        """φ' at the frame's values."""
        return frame.once(self, lambda: self.phi.slope(frame[self.inputs[0]], frame[self.outputs[0]]))


def writes_into_argument(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call overwrites its first argument."""
    name = getattr(function, "__name__", "")
    if name.startswith("__i") and name.endswith("__") and name not in ("__invert__", "__index__", "__int__"):
        return True
    if name.endswith("_") and not name.endswith("__") and name not in ("requires_grad_", "detach_", "retain_grad_"):
        return True
    if name == "__setitem__":
        return True
    if kwargs.get("inplace"):
        return True
    place = _INPLACE_AT.get(name)
    return place is not None and len(args) > place and args[place] is True


_INPLACE_AT = {"relu": 1, "relu6": 1, "hardtanh": 3, "hardswish": 1, "hardsigmoid": 1, "elu": 2, "selu": 1, "celu": 2}
_INPLACE_AT |= {
    "leaky_relu": 2,
    "silu": 1,
    "mish": 1,
    "threshold": 3,
    **{f"dropout{n}": 3 for n in ("", "1d", "2d", "3d")},
}


def tensors_of(result: Any) -> list[Tensor]:
    """The tensors in what a call returned, one by one."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, (tuple, list)):
        return [t for each in result for t in tensors_of(each)]
    return []


def slots_in(tree: Any) -> list[Slot]:
    """The slots among arguments, each once."""
    found: list[Slot] = []
    waiting = [tree]
    while waiting:
        each = waiting.pop()
        if isinstance(each, Slot):
            found.append(each)
        elif type(each) in (tuple, list):
            waiting.extend(reversed(each))
        elif type(each) is dict:
            waiting.extend(reversed(each.values()))
    return list(dict.fromkeys(found))


def _filled(tree: Any, value: Callable[[Slot], Tensor], dtype: torch.dtype, still: bool = False) -> Any:
    """Arguments with tensors in their slots; ``still`` puts zeros for other numbers, which do not move."""
    if isinstance(tree, Slot):
        return value(tree)
    if isinstance(tree, Tensor):
        fixed = constant(tree, dtype)
        return torch.zeros_like(fixed) if still and fixed.is_floating_point() else fixed
    if isinstance(tree, dict):
        return {k: _filled(v, value, dtype, still) for k, v in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)(_filled(v, value, dtype, still) for v in tree)
    return tree


def constant(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor that no sample moves, such as a weight, as the dtype of the pass has it."""
    return value.detach().to(dtype) if value.is_floating_point() else value


def _two(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    found = [*args[:2], *(kwargs[name] for name in ("input", "other") if name in kwargs)]
    return found[0], found[1]
