"""How an operation between two control points passes deviations on.

With x⁻ the feedforward value of its argument and δ what the control adds to it, an operation f has to give
f(x⁻ + δ) − f(x⁻) without losing the digits of a small δ. Linear operations are applied to δ itself, elementwise
nonlinearities have differences of their own (:mod:`.nonlinearity`), batch normalisation is an affine map with the
statistics of the feedforward pass, and everything else is subtracted in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfc_lightning.control.nonlinearity import Elementwise, LeakyReLU, Nonlinearity, ReLU, Sigmoid, Tanh


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
        inputs = {s: (frame[s], torch.zeros_like(frame[s]) if moved[s] is None else moved[s]) for s in self.inputs}

        def run(*values: Tensor) -> tuple[Tensor, ...]:
            given = dict(zip(inputs, values))
            return tuple(self.at(given.__getitem__, frame.dtype))

        values, changes = zip(*inputs.values())
        return torch.func.jvp(run, values, changes)[1]

    def deviations(self, frame: Frame, moved: Deviations) -> Sequence[Tensor | None]:
        """The change of its results, one an output, when its inputs change by ``moved``."""
        wide = {s: frame[s].double() for s in self.inputs}
        before = frame.once(self, lambda: self.at(wide.__getitem__, torch.float64))
        for slot in self.inputs:
            if (change := moved[slot]) is not None:
                wide[slot] = wide[slot] + change.double()
        after = self.at(wide.__getitem__, torch.float64)
        return [(a - b).to(frame[slot].dtype) for a, b, slot in zip(after, before, self.outputs)]

    def at(self, value: Callable[[Slot], Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
        """The operation with other values in its slots."""
        args, kwargs = _filled((self.args, self.kwargs), value, dtype)
        if writes_into_argument(self.function, args, kwargs):
            args = [args[0].clone(), *args[1:]]
        return tensors_of(self.function(*args, **kwargs))


class Exact(Operation):
    """An operation that is linear in what moves."""

    def tangents(self, frame: Frame, moved: Deviations) -> Sequence[Tensor | None]:
        return self.deviations(frame, moved)


class Linear(Exact):
    """Linear in its only tensor or tensors, such as pooling by averages, or taken apart and put together."""

    def deviations(self, frame: Frame, moved: Deviations) -> Sequence[Tensor | None]:
        def change(slot: Slot) -> Tensor:
            found = moved[slot]
            return torch.zeros_like(frame[slot]) if found is None else found

        return self.at(change, frame.dtype)


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
        (x, dx), (y, dy) = ((frame[a], moved[a]) if isinstance(a, Slot) else (a, None) for a in _two(self.args, {}))
        if dx is None:
            return [x * dy]
        if dy is None:
            return [dx * y]
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


class MaxPool(Operation):
    """Max-pooling of maps of one, two or three dimensions.

    With x_o the entry at offset o of a window and y⁻ the largest, the change is the largest of (x_o⁻ − y⁻) + δ_o.

    Args:
        dims: of the maps.
    """

    def __init__(self, *args: Any, dims: int) -> None:
        super().__init__(*args)
        named = dict(zip(("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode"), self.args))
        named |= self.kwargs

        def each(name: str, default: Any) -> list[int]:
            value = named.get(name)
            value = default if value is None or value == [] else value
            return list(value) if isinstance(value, (tuple, list)) else [value] * dims

        self.kernel = each("kernel_size", 1)
        self.stride, self.padding = each("stride", self.kernel), each("padding", 0)
        self.dilation = each("dilation", 1)

    def deviations(self, frame: Frame, moved: Deviations) -> Sequence[Tensor | None]:
        x, y, change = frame[self.inputs[0]], frame[self.outputs[0]], moved[self.inputs[0]]
        assert change is not None
        gaps = frame.once(self, lambda: [e - y for e in self._entries(x, y.shape[2:], -torch.inf)])
        largest: Tensor | None = None
        for gap, entry in zip(gaps, self._entries(change, y.shape[2:], 0.0)):
            reached = gap + entry
            largest = reached if largest is None else torch.maximum(largest, reached, out=largest)
        return [largest]

    def tangents(self, frame: Frame, moved: Deviations) -> Sequence[Tensor | None]:
        x, size, change = frame[self.inputs[0]], frame[self.outputs[0]].shape[2:], moved[self.inputs[0]]
        assert change is not None
        where = frame.once(
            (self, "winner"), lambda: torch.stack(self._entries(x, size, -torch.inf)).argmax(0, keepdim=True)
        )
        return [torch.stack(self._entries(change, size, 0.0)).gather(0, where).squeeze(0)]

    def wins(self, frame: Frame) -> Tensor:
        """In how many windows each entry is the largest, in the shape of the argument."""
        return frame.once((self, "wins"), lambda: self._wins(frame[self.inputs[0]], frame[self.outputs[0]]))

    def _wins(self, x: Tensor, y: Tensor) -> Tensor:
        count = torch.zeros_like(x)
        places = self._entries(torch.arange(x[0, 0].numel(), device=x.device).view(1, 1, *x.shape[2:]), y.shape[2:], -1)
        free = torch.ones_like(y, dtype=torch.bool)
        for entry, place in zip(self._entries(x, y.shape[2:], -torch.inf), places):
            won = free & (entry == y)
            free &= ~won
            inside = place.flatten() >= 0
            count.flatten(2).index_add_(2, place.flatten()[inside], won.flatten(2)[..., inside].to(x))
        return count

    def _entries(self, x: Tensor, size: Sequence[int], outside: float) -> list[Tensor]:
        """The entries of all windows at each offset, in the shape of the result."""
        reach = [s * (n - 1) + 1 for s, n in zip(self.stride, size)]
        need = [r + d * (k - 1) for r, d, k in zip(reach, self.dilation, self.kernel)]
        after = [max(0, n - p - m) for n, p, m in zip(need, self.padding, x.shape[2:])]
        if any(self.padding) or any(after):
            x = F.pad(x, [n for pair in zip(reversed(self.padding), reversed(after)) for n in pair], value=outside)
        offsets = itertools.product(*(range(0, d * k, d) for d, k in zip(self.dilation, self.kernel)))
        return [
            x[(..., *(slice(o, o + r, s) for o, r, s in zip(offset, reach, self.stride)))] for offset in offsets
        ]


class BatchNorm(Exact):
    """Batch normalisation with the statistics of the feedforward pass held: an affine map of each channel.

    Args:
        x: what was normalised, (B, C, …).
    """

    def __init__(self, *args: Any, x: Tensor) -> None:
        super().__init__(*args)
        named = dict(zip(_BATCH_NORM, self.args)) | self.kwargs
        self.weight, self.bias, self.eps = named.get("weight"), named.get("bias"), named.get("eps", 1e-5)
        self.by_batch = named.get("training", False)
        if self.by_batch:
            axes = [0, *range(2, x.dim())]
            self.variance, self.mean = torch.var_mean(x.detach().to(_full(x.dtype)), axes, correction=0)
        else:
            self.variance, self.mean = (named[n].detach().clone() for n in ("running_var", "running_mean"))

    @property
    def scale(self) -> Tensor:
        """γ / σ of each channel, (C,)."""
        inverse = (self.variance + self.eps).rsqrt()
        return inverse if self.weight is None else inverse * self.weight.detach()

    def values(self, frame: Frame) -> Sequence[Tensor]:
        x = frame[self.inputs[0]]
        shift = -self.mean * self.scale + (0 if self.bias is None else self.bias.detach())
        return [torch.addcmul(_per_channel(shift, x), x, _per_channel(self.scale, x))]

    def deviations(self, frame: Frame, moved: Deviations) -> Sequence[Tensor | None]:
        change = moved[self.inputs[0]]
        assert change is not None
        return [change * _per_channel(self.scale, change)]


class Live(BatchNorm):
    """The same, the statistics following their batch: what backprop differentiates."""

    def __init__(self, norm: BatchNorm) -> None:
        self.__dict__.update(norm.__dict__)

    def values(self, frame: Frame) -> Sequence[Tensor]:
        return [self.normalised(frame[self.inputs[0]], self.weight, self.bias)]

    def normalised(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Normalise ``x``; no running statistics move."""
        if self.by_batch:
            return F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        return F.batch_norm(x, self.mean, self.variance, weight, bias, False, 0.0, self.eps)


_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")

_WEIGHTED = {"linear", *(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3))}
_SAME = {"to", "float", "half", "double", "bfloat16", "type_as", "clone", "contiguous", "detach", "alias"}
_RESHAPE = {"view", "reshape", "flatten", "unflatten", "view_as", "reshape_as"}
_LINEAR = {"mean", "sum", "neg", "__neg__", "cat", "concat", "concatenate", "stack", "chunk", "split", "unbind"}
_LINEAR |= {"permute", "transpose", "movedim", "swapaxes", "squeeze", "unsqueeze", "__getitem__", "narrow", "select"}
_LINEAR |= {f"{kind}_pool{n}d" for kind in ("avg", "adaptive_avg") for n in (1, 2, 3)} | {"flip", "roll"}
_MAX_POOL = {f"max_pool{n}d": n for n in (1, 2, 3)}
_SUM = {"add": 1, "__add__": 1, "__radd__": 1, "add_": 1, "__iadd__": 1, "sub": -1, "__sub__": -1, "sub_": -1}
_SUM |= {"__isub__": -1, "subtract": -1}
_PRODUCT = {"mul", "__mul__", "__rmul__", "mul_", "__imul__", "multiply"}
_RATES: dict[str, Nonlinearity] = {"relu": ReLU, "tanh": Tanh(), "sigmoid": Sigmoid()}
_OTHER_RATES = {"relu6", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus", "hardtanh", "hardswish"}
_OTHER_RATES |= {"hardsigmoid", "logsigmoid", "softsign", "tanhshrink", "hardshrink", "softshrink", "sin", "exp"}
RANDOM = {"alpha_dropout", "feature_alpha_dropout", "rrelu", "rrelu_", "gumbel_softmax", "bernoulli", "bernoulli_"}
RANDOM |= {"multinomial", "poisson", "normal_", "uniform_", "scaled_dot_product_attention"}


def operation(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    inputs: list[Slot],
    outputs: list[Slot],
    values: Sequence[Tensor],
) -> Operation:
    """The recorded call as the operation that knows best how to pass deviations on.

    Args:
        function: what was called.
        args: its positional arguments, recorded tensors replaced by their slots.
        kwargs: its keyword arguments, likewise.
        inputs: the slots in these.
        outputs: slots of the tensors it returned.
        values: the values of all slots, its arguments' as they were before the call.
    """
    call = (function, args, kwargs, inputs, outputs)
    name = getattr(function, "__name__", str(function))
    one = len(inputs) == 1 and len(outputs) == 1
    same_shape = one and values[inputs[0]].shape == values[outputs[0]].shape
    if name in _WEIGHTED and one and args[:1] == (inputs[0],):
        return Weighted(*call)
    if name == "batch_norm" and one:
        return BatchNorm(*call, x=values[inputs[0]])
    if name in _SAME and same_shape:
        return Same(*call)
    if name in _RESHAPE and one and values[outputs[0]].shape[:1] == values[inputs[0]].shape[:1]:
        return Reshape(*call, shape=values[outputs[0]].shape)
    if name in _SUM and len(outputs) == 1:
        return Sum(*call, sign=_SUM[name])
    if name in _PRODUCT and len(outputs) == 1:
        return Product(*call)
    if name in _LINEAR:
        return Linear(*call)
    if name in _MAX_POOL and one and values[inputs[0]].dim() == _MAX_POOL[name] + 2:
        return MaxPool(*call, dims=_MAX_POOL[name])
    plain = Operation(*call)
    if same_shape and (phi := _nonlinearity(plain)) is not None:
        return Rate(*call, phi=phi)
    return plain


def _nonlinearity(call: Operation) -> Nonlinearity | None:
    name = call.name.removesuffix("_")
    if name in _RATES:
        return _RATES[name]
    if name == "leaky_relu":
        slope = call.args[1] if len(call.args) > 1 else call.kwargs.get("negative_slope", 0.01)
        return LeakyReLU(float(slope))
    if name not in _OTHER_RATES:
        return None
    return Elementwise(lambda v: call.at(lambda slot: v, v.dtype)[0])


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
_INPLACE_AT |= {"leaky_relu": 2, "silu": 1, "mish": 1, "threshold": 3, **{f"dropout{n}": 3 for n in ("", "1d", "2d", "3d")}}


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


def _filled(tree: Any, value: Callable[[Slot], Tensor], dtype: torch.dtype) -> Any:
    if isinstance(tree, Slot):
        return value(tree)
    if isinstance(tree, Tensor):
        return constant(tree, dtype)
    if isinstance(tree, dict):
        return {k: _filled(v, value, dtype) for k, v in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)(_filled(v, value, dtype) for v in tree)
    return tree


def constant(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor that no sample moves, such as a weight, as the dtype of the pass has it."""
    return value.detach().to(dtype) if value.is_floating_point() else value


def _two(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    second = args[1] if len(args) > 1 else kwargs["other"]
    return args[0], second


def _per_channel(value: Tensor, like: Tensor) -> Tensor:
    return value.view(-1, *[1] * (like.dim() - 2)).expand_as(like)


def _full(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
