"""Operations that are linear in what moves, and products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dfc_lightning.operations.arguments import tensors_of
from dfc_lightning.operations.layout import SHARED
from dfc_lightning.operations.operation import Deviations, Frame, Operation, Slot, constant, filled


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

        args, kwargs = filled((self.args, self.kwargs), change, frame.dtype, still=True)
        return tensors_of(self.function(*args, **kwargs))


class Reshape(Exact):
    """Samples keep apart, in whatever shape; the recorded shape holds for any number of them."""

    def __init__(self, *args: Any, shape: Sequence[int]) -> None:
        super().__init__(*args)
        self.shape = tuple(shape)

    def values(self, frame: Frame) -> Sequence[Tensor]:
        return [self.made(frame, frame[self.inputs[0]])]

    def deviations(self, frame: Frame, moved: Deviations) -> Sequence[Tensor | None]:
        change = moved[self.inputs[0]]
        assert change is not None
        return [self.made(frame, change)]

    def pulled(self, frame: Frame, errors: Sequence[Tensor | None], live: bool = False) -> Sequence[Tensor | None]:
        return [_summed_to(errors[0], frame, self.outputs[0], self.inputs[0])]

    def made(self, frame: Frame, value: Tensor) -> Tensor:
        """What becomes of a tensor, in the frame's number of samples."""
        return self._shaped(value, frame.layouts[self.outputs[0]].sized(self.shape, frame.batch))

    def _shaped(self, value: Tensor, shape: tuple[int, ...]) -> Tensor:
        return value.reshape(shape)


class Expand(Reshape):
    """The same along new or single positions, for any number of samples."""

    def _shaped(self, value: Tensor, shape: tuple[int, ...]) -> Tensor:
        return value.expand(shape)


class Same(Exact):
    """Hands its tensor on as it is: casts, and copies."""

    def values(self, frame: Frame) -> Sequence[Tensor]:
        return [frame[self.inputs[0]]]

    def deviations(self, frame: Frame, moved: Deviations) -> Sequence[Tensor | None]:
        return [moved[self.inputs[0]]]

    def pulled(self, frame: Frame, errors: Sequence[Tensor | None], live: bool = False) -> Sequence[Tensor | None]:
        return [errors[0]]


class Weighted(Exact):
    """A linear or convolutional layer: its bias does not pass deviations."""

    def deviations(self, frame: Frame, moved: Deviations) -> Sequence[Tensor | None]:
        rest = {name: value for name, value in self.kwargs.items() if name not in ("input", "weight", "bias")}
        weight = constant(self.arguments["weight"], frame.dtype)
        return [self.function(moved[self.inputs[0]], weight, None, *self.args[3:], **rest)]

    def pulled(self, frame: Frame, errors: Sequence[Tensor | None], live: bool = False) -> Sequence[Tensor | None]:
        return self.pulled_through(self.arguments["weight"], frame, errors)

    def pulled_through(self, weight: Tensor, frame: Frame, errors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The same through another weight of the same shape."""
        error, weight = errors[0], constant(weight, frame.dtype)
        assert error is not None
        if self.name == "linear":
            return [error @ weight]
        heard = error.new_empty(error.shape[0], *frame[self.inputs[0]].shape[1:])  # only its shape counts
        return [self.backward(error, heard, weight, [True, False, False])[0]]

    def taught(self, weight: Tensor, bias: bool, signal: Tensor, heard: Tensor) -> list[Tensor]:
        """What weight and bias are taught by a signal at the layer's output and what it hears: Σ_b t rᵀ, Σ_b t."""
        if self.name == "linear":
            flat = signal.flatten(0, -2)
            found = [flat.T @ heard.flatten(0, -2)]
            return [*found, flat.sum(0)] if bias else found
        _, of_weight, of_bias = self.backward(signal.contiguous(), heard, weight, [False, True, bias])
        return [of_weight, of_bias] if bias else [of_weight]

    def backward(self, error: Tensor, heard: Tensor, weight: Tensor, wanted: list[bool]) -> Sequence[Tensor]:
        """The derivatives of a convolution: of input, weight and bias, as wanted."""
        given = self.arguments
        dims, transposed = weight.dim() - 2, self.name.startswith("conv_transpose")
        sizes = {n: _each(given.get(n, d), dims) for n, d in (("stride", 1), ("padding", 0), ("dilation", 1))}
        if isinstance(given.get("padding"), str):
            sizes["padding"] = _padding(given["padding"], weight.shape[2:], sizes["dilation"])
        channels = weight.shape[1] * given.get("groups", 1) if transposed else weight.shape[0]
        return torch.ops.aten.convolution_backward(
            error,
            heard,
            weight,
            [channels] if wanted[2] else None,
            sizes["stride"],
            sizes["padding"],
            sizes["dilation"],
            transposed,
            _each(given.get("output_padding", 0), dims),
            given.get("groups", 1),
            wanted,
        )


class Sum(Exact):
    """x + y and x − y."""

    def __init__(self, *args: Any, sign: int) -> None:
        super().__init__(*args)
        self.scale = sign * self.kwargs.get("alpha", 1)

    def deviations(self, frame: Frame, moved: Deviations) -> Sequence[Tensor | None]:
        first, second = (moved[a] if isinstance(a, Slot) else None for a in two(self.args, self.kwargs))
        shape = frame[self.outputs[0]].shape
        if second is None:
            assert first is not None
            return [first.expand(shape)]
        if first is None:
            return [(second * self.scale).expand(shape)]
        return [torch.add(first, second, alpha=self.scale)]

    def pulled(self, frame: Frame, errors: Sequence[Tensor | None], live: bool = False) -> Sequence[Tensor | None]:
        error = errors[0]
        assert error is not None
        found: dict[int, Tensor] = {}
        for term, scale in zip(two(self.args, self.kwargs), (1, self.scale)):
            if isinstance(term, Slot) and frame.layouts[term] != SHARED:
                share = _summed_to(error if scale == 1 else error * scale, frame, self.outputs[0], term)
                found[term] = found[term] + share if term in found else share
        return [found.get(s) for s in self.inputs]


class Product(Operation):
    """x y: δx y⁻ + (x⁻ + δx) δy."""

    def tangents(self, frame: Frame, moved: Deviations) -> Sequence[Tensor | None]:
        return self._changes(frame, moved, 0.0)

    def deviations(self, frame: Frame, moved: Deviations) -> Sequence[Tensor | None]:
        return self._changes(frame, moved, 1.0)

    def _changes(self, frame: Frame, moved: Deviations, second_order: float) -> Sequence[Tensor | None]:
        (x, dx), (y, dy) = (
            (frame[a], moved[a]) if isinstance(a, Slot) else (a, None) for a in two(self.args, self.kwargs)
        )
        if dy is None:
            assert dx is not None
            return [dx * y]
        if dx is None:
            return [x * dy]
        return [dx * y + (x + second_order * dx) * dy]

    def pulled(self, frame: Frame, errors: Sequence[Tensor | None], live: bool = False) -> Sequence[Tensor | None]:
        error, (x, y) = errors[0], two(self.args, self.kwargs)
        assert error is not None
        found: dict[int, Tensor] = {}
        for term, other in ((x, y), (y, x)):
            if isinstance(term, Slot) and frame.layouts[term] != SHARED:
                if isinstance(other, Slot):
                    factor = frame[other].expand(frame[self.outputs[0]].shape)
                    share = frame.layouts[self.outputs[0]].weighed(error, factor)
                else:
                    share = error * other
                share = _summed_to(share, frame, self.outputs[0], term)
                found[term] = found[term] + share if term in found else share
        return [found.get(s) for s in self.inputs]


def two(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The two arguments of a sum or a product."""
    found = [*args[:2], *(kwargs[name] for name in ("input", "other") if name in kwargs)]
    return found[0], found[1]


def _summed_to(error: Tensor | None, frame: Frame, source: Slot, target: Slot) -> Tensor:
    """An error at one slot, maybe of several times the batch, in the shape of another that was spread to it."""
    assert error is not None
    several = frame.layouts[source].times(error.shape, frame[source].shape)
    shape = frame.layouts[target].sized(frame[target].shape, several * frame.batch)
    return error.reshape(shape) if error.numel() == torch.Size(shape).numel() else error.sum_to_size(shape)


def _each(value: object, dims: int) -> list[int]:
    if isinstance(value, str):
        return [0] * dims
    return list(value) if isinstance(value, (tuple, list)) else [value] * dims  # type: ignore[list-item]


def _padding(kind: str, kernel: torch.Size, dilation: list[int]) -> list[int]:
    return [0] * len(kernel) if kind == "valid" else [d * (k - 1) // 2 for d, k in zip(dilation, kernel)]
