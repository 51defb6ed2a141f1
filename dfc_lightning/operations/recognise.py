"""Which operation a recorded call is: a table of handlers by the names of torch's functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dfc_lightning.errors import ControlError
from dfc_lightning.operations.arguments import named
from dfc_lightning.operations.batch_norm import BatchNorm
from dfc_lightning.operations.layer_norm import LayerNorm
from dfc_lightning.operations.linear import Expand, Linear, Product, Reshape, Same, Sum, Weighted
from dfc_lightning.operations.max_pool import MaxPool
from dfc_lightning.operations.nonlinearity import Clamp, Elementwise, LeakyReLU, Nonlinearity, ReLU, Sigmoid, Tanh
from dfc_lightning.operations.operation import Operation, Slot
from dfc_lightning.operations.rate import Rate
from dfc_lightning.operations.surrogate import surrogate


@dataclass(frozen=True)
class Call:
    """A call as it was recorded.

    Args:
        function: what was called.
        args: its positional arguments, recorded tensors replaced by their slots.
        kwargs: its keyword arguments, likewise.
        inputs: the slots in these.
        outputs: slots of the tensors it returned.
        values: the values of all slots, its arguments' as they were before the call.
    """

    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: dict[str, Any]
    inputs: list[Slot]
    outputs: list[Slot]
    values: Sequence[Tensor]

    @property
    def name(self) -> str:
        """The function's name."""
        return getattr(self.function, "__name__", str(self.function))

    @property
    def parts(self) -> tuple[Any, ...]:
        """What an operation is made of."""
        return self.function, self.args, self.kwargs, self.inputs, self.outputs

    @property
    def one(self) -> bool:
        """Whether one recorded tensor becomes one."""
        return len(self.inputs) == 1 and len(self.outputs) == 1

    @property
    def x(self) -> Tensor:
        """The first recorded argument."""
        return self.values[self.inputs[0]]

    @property
    def y(self) -> Tensor:
        """The first result."""
        return self.values[self.outputs[0]]


Handler = Callable[[Call], "Operation | None"]
"""The operation that knows best how to pass a call's deviations on; None where a call is none of its kind."""

HANDLERS: dict[str, Handler] = {}


def handles(names: Iterable[str]) -> Callable[[Handler], Handler]:
    """Enter a handler into the table."""

    def enter(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return enter


@handles(["linear", *(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3))])
def _weighted(call: Call) -> Operation | None:
    heard = named(call.function, call.args, call.kwargs).get("input")
    return Weighted(*call.parts) if call.one and heard is call.inputs[0] else None


@handles(["batch_norm"])
def _batch_norm(call: Call) -> Operation | None:
    return BatchNorm(*call.parts, x=call.x) if call.one else None


@handles(["layer_norm", "rms_norm"])
def _layer_norm(call: Call) -> Operation | None:
    centred = call.name == "layer_norm"
    eps = named(call.function, call.args, call.kwargs).get("eps")  # what rms_norm takes by default torch does not tell
    return LayerNorm(*call.parts, centred=centred) if call.one and (centred or eps is not None) else None


@handles(["to", "float", "half", "double", "bfloat16", "type_as", "clone", "contiguous", "detach", "alias"])
def _same(call: Call) -> Operation | None:
    return Same(*call.parts) if call.one and call.x.shape == call.y.shape else None


@handles(["view", "reshape", "flatten", "unflatten", "squeeze", "view_as", "reshape_as"])
def _reshape(call: Call) -> Operation | None:
    return Reshape(*call.parts, shape=call.y.shape) if call.one else None


@handles(["expand", "expand_as", "broadcast_to"])
def _expand(call: Call) -> Operation | None:
    return Expand(*call.parts, shape=call.y.shape) if call.one and call.x.dim() == call.y.dim() else None


@handles(["add", "__add__", "__radd__", "add_", "__iadd__"])
def _sum(call: Call) -> Operation | None:
    return Sum(*call.parts, sign=1) if len(call.outputs) == 1 else None


@handles(["sub", "__sub__", "sub_", "__isub__", "subtract"])
def _difference(call: Call) -> Operation | None:
    return Sum(*call.parts, sign=-1) if len(call.outputs) == 1 else None


@handles(["mul", "__mul__", "__rmul__", "mul_", "__imul__", "multiply"])
def _product(call: Call) -> Operation | None:
    return Product(*call.parts) if len(call.outputs) == 1 else None


@handles(["mean", "sum", "neg", "__neg__", "cat", "concat", "concatenate", "stack", "chunk", "split", "unbind"])
@handles(["permute", "transpose", "movedim", "swapaxes", "unsqueeze", "__getitem__", "narrow", "select"])
@handles(f"{kind}_pool{n}d" for kind in ("avg", "adaptive_avg") for n in (1, 2, 3))
@handles(["flip", "roll"])
def _linear(call: Call) -> Operation | None:
    return Linear(*call.parts)


@handles(f"max_pool{n}d" for n in (1, 2, 3))
def _max_pool(call: Call) -> Operation | None:
    dims = int(call.name[-2])
    return MaxPool(*call.parts, dims=dims) if call.one and call.x.dim() == dims + 2 else None


@handles(["fused_moving_avg_obs_fake_quant", *(f"fake_quantize_per_{kind}_affine" for kind in ("tensor", "channel"))])
def _quantised(call: Call) -> Operation | None:
    return surrogate(call.name, call.parts, call.values)


def _rate(phi: Callable[[Call], Nonlinearity]) -> Handler:
    return lambda call: Rate(*call.parts, phi=phi(call)) if call.one and call.x.shape == call.y.shape else None


def _leaky(call: Call) -> Nonlinearity:
    given = named(call.function, call.args, call.kwargs)
    by_position = call.args[1] if len(call.args) > 1 else 0.01  # leaky_relu_ does not tell the names
    return LeakyReLU(float(given.get("negative_slope", by_position)))


def _hardtanh(call: Call) -> Nonlinearity:
    given = named(call.function, call.args, call.kwargs)
    return Clamp(float(given.get("min_val", -1.0)), float(given.get("max_val", 1.0)))


def _other(call: Call) -> Nonlinearity:
    again = Operation(*call.parts)
    return Elementwise(lambda v: again.at(lambda slot: v, v.dtype)[0])


_OTHERS = ["elu", "selu", "celu", "gelu", "silu", "mish", "softplus", "hardswish", "hardsigmoid"]
_OTHERS += ["logsigmoid", "softsign", "tanhshrink", "hardshrink", "softshrink", "sin", "exp"]
_PHI: dict[str, Callable[[Call], Nonlinearity]] = {
    "relu": lambda call: ReLU,
    "tanh": lambda call: Tanh(),
    "sigmoid": lambda call: Sigmoid(),
    "leaky_relu": _leaky,
    "relu6": lambda call: Clamp(0.0, 6.0),
    "hardtanh": _hardtanh,
    **dict.fromkeys(_OTHERS, _other),
}
for _name, _phi in _PHI.items():
    handles([_name, f"{_name}_"])(_rate(_phi))


def operation(call: Call) -> Operation:
    """The recorded call as the operation that knows best how to pass deviations on."""
    handler = HANDLERS.get(call.name)
    smooth = all(call.values[s].is_floating_point() for s in (*call.inputs, *call.outputs))
    found = handler(call) if handler is not None and smooth else None
    return Operation(*call.parts) if found is None else found


DROPOUT = ("dropout", "dropout1d", "dropout2d", "dropout3d", "dropout_", "feature_dropout", "feature_dropout_")


def dropped(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """What a call of dropout is given, if it draws a mask."""
    if getattr(function, "__name__", "") not in DROPOUT:
        return None
    given = named(function, args, kwargs)
    return given["input"] if given.get("training", given.get("train", True)) else None  # type: ignore[no-any-return]


# Calls that no pass can make again

RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_RANDOM = {"gumbel_softmax", "bernoulli", "bernoulli_", "multinomial", "poisson", "normal_", "uniform_"}
_RANDOM_BY: dict[str, tuple[str, ...]] = {
    "scaled_dot_product_attention": ("dropout_p",),
    **dict.fromkeys(["alpha_dropout", "feature_alpha_dropout", "rrelu", "rrelu_"], ("training", "train")),
}
"""The arguments with which a call draws random numbers."""


def draws_random_numbers(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call draws random numbers, other than dropout."""
    name = getattr(function, "__name__", "")
    if name in RECURRENT:
        padded = isinstance(args[3], bool)
        share, training = args[5:7] if padded else args[6:8]
        return bool(share and training)
    if name == "multi_head_attention_forward":
        given = named(function, args, kwargs)
        return bool(given["dropout_p"] and given.get("training", True))
    if name in _RANDOM_BY:
        given = named(function, args, kwargs)
        return any(given.get(argument) for argument in _RANDOM_BY[name])
    return name in _RANDOM


def moves_statistics(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call moves running statistics, other than those of batch normalisation."""
    name, given = getattr(function, "__name__", ""), named(function, args, kwargs)
    if name == "fused_moving_avg_obs_fake_quant":
        return bool(given["observer_on"])
    return name == "instance_norm" and given.get("running_mean") is not None and given.get("use_input_stats", True)


def refuse_unrepeatable(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raise a :class:`ControlError` for a call that cannot be made again as it was."""
    name = getattr(func, "__name__", str(func))
    if draws_random_numbers(func, args, kwargs):
        raise ControlError(
            f"The network draws random numbers in {name}, which cannot be drawn alike while it settles. Use "
            "nn.Dropout, whose masks are kept, take it out, or set the dropout of an attention or recurrent layer to 0."
        )
    if kwargs.get("out") is not None or moves_statistics(func, args, kwargs):
        raise ControlError(
            f"The call of {name} writes into a tensor from outside, and would do so again and again while the "
            "network settles. Leave out=… away, and track_running_stats; let torch.ao's observers see the data before, "
            "and switch them off with disable_observer."
        )
