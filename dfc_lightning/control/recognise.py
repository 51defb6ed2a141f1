"""Which operation a recorded call is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from dfc_lightning.control.batch_norm import BatchNorm
from dfc_lightning.control.nonlinearity import Elementwise, LeakyReLU, Nonlinearity, ReLU, Sigmoid, Tanh
from dfc_lightning.control.operations import (
    Expand,
    Linear,
    Operation,
    Product,
    Rate,
    Reshape,
    Same,
    Slot,
    Sum,
    Weighted,
)
from dfc_lightning.control.pooling import MaxPool

_WEIGHTED = {"linear", *(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3))}
_SAME = {"to", "float", "half", "double", "bfloat16", "type_as", "clone", "contiguous", "detach", "alias"}
_EXPAND = {"expand", "expand_as", "broadcast_to"}
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
_RANDOM = {"gumbel_softmax", "bernoulli", "bernoulli_", "multinomial", "poisson", "normal_", "uniform_"}


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
    if not all(values[s].is_floating_point() for s in (*inputs, *outputs)):
        return Operation(*call)
    if name in _WEIGHTED and one and len(args) > 0 and args[0] is inputs[0]:
        return Weighted(*call)
    if name == "batch_norm" and one:
        return BatchNorm(*call, x=values[inputs[0]])
    if name in _SAME and same_shape:
        return Same(*call)
    if name in _RESHAPE and one and values[outputs[0]].shape[:1] == values[inputs[0]].shape[:1]:
        return Reshape(*call, shape=values[outputs[0]].shape)
    if name in _EXPAND and one and values[outputs[0]].dim() == values[inputs[0]].dim():
        return Expand(*call, shape=values[outputs[0]].shape)
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


def draws_random_numbers(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call draws random numbers, other than dropout."""
    if name == "scaled_dot_product_attention":
        return bool(args[4] if len(args) > 4 else kwargs.get("dropout_p"))
    place = {"alpha_dropout": 2, "feature_alpha_dropout": 2, "rrelu": 3, "rrelu_": 3}.get(name)
    if place is not None:
        return bool(args[place] if len(args) > place else kwargs.get("training", kwargs.get("train", False)))
    return name in _RANDOM
