"""What a recorded pass says of a control point: its parameters' part in it, and where its voltage becomes a rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dfc_lightning.errors import ControlError
from dfc_lightning.operations.linear import Product, Reshape, Same, Sum, Weighted
from dfc_lightning.operations.max_pool import MaxPool
from dfc_lightning.operations.nonlinearity import Identity
from dfc_lightning.operations.operation import Frame, Operation
from dfc_lightning.operations.passage import Passage
from dfc_lightning.operations.rate import Rate
from dfc_lightning.passes.record import Site
from dfc_lightning.passes.segment import LAYERS, NORMS, Segment
from dfc_lightning.recording.composed import is_bent, rate_of
from dfc_lightning.recording.points import ControlPoint

NORMS_BY_NAME = ("batch_norm", "group_norm", "layer_norm", "rms_norm", "instance_norm")
_POOLING = tuple(f"{kind}pool{n}d" for kind in ("max_", "avg_", "adaptive_avg_", "adaptive_max_") for n in (1, 2, 3))


def segment_of(point: ControlPoint, passage: Passage, makers: Mapping[int, Operation]) -> Segment:
    """The calls of a point's layer and normalisation.

    Raises:
        ControlError: the module does more than these.
    """
    last = makers.get(passage.source)
    layer: Operation | None = last
    norm: Operation | None = None
    if not isinstance(point.layer, LAYERS) or point.norm is not None or (last is not None and is_untaught_norm(last)):
        norm, layer = last, None
        if norm is not None and isinstance(point.layer, LAYERS):
            wire = makers[norm.inputs[0]]
            layer = makers[wire.inputs[0]]
    normed = point.layer if layer is None else point.norm
    first = layer or norm
    plain = first is not None and len(first.inputs) == 1
    if layer is not None:
        plain = plain and isinstance(layer, Weighted) and _has(layer, point.layer)
    if norm is not None:
        plain = plain and norm.name in NORMS_BY_NAME and _has(norm, normed)
    if not plain:
        raise does_more(point.name)
    return Segment(
        layer if isinstance(layer, Weighted) else None,
        norm,
        point.layer.weight if layer is not None else None,  # type: ignore[arg-type]
        point.layer.bias if layer is not None else None,  # type: ignore[arg-type]
        getattr(normed, "weight", None),
        getattr(normed, "bias", None),
    )


def does_more(name: str) -> ControlError:
    """What to say of a layer whose parameters do more than torch's own layers do with them."""
    return ControlError(
        f"The layer {name!r} does more than multiply its input with its weights. Feedback control teaches torch's own "
        f"linear and convolutional layers and normalisations; name it in extra_points=[{name!r}], so that it is "
        "controlled as a whole, or freeze it with requires_grad_(False)."
    )


def is_own_call(layer: nn.Module, call: Operation) -> bool:
    """Whether a call is what torch's own layer of this kind does with its parameters, as they are."""
    fits = call.name in NORMS_BY_NAME if isinstance(layer, NORMS) else call.name.startswith(("linear", "conv"))
    return fits and len(call.inputs) == 1 and _given(layer, call.args, call.kwargs)


def own_segment(call: Operation, learned: Sequence[nn.Parameter]) -> Segment | None:
    """That of a call which does with its parameters what a layer or a normalisation does, wherever it is."""
    if len(call.inputs) != 1 or not (isinstance(call, Weighted) or call.name in NORMS_BY_NAME):
        return None
    weight, bias = call.arguments.get("weight"), call.arguments.get("bias")
    taught = [p for p in (weight, bias) if p is not None]
    if not all(isinstance(p, nn.Parameter) for p in taught) or any(all(p is not t for t in taught) for p in learned):
        return None
    if isinstance(call, Weighted):
        return Segment(call, None, weight, bias)
    return Segment(None, call, norm_weight=weight, norm_bias=bias)


def is_untaught_norm(call: Operation) -> bool:
    """Whether it is a normalisation, of a module or not, with nothing in it that learns."""
    given = (*call.args, *call.kwargs.values())
    learns = any(isinstance(value, nn.Parameter) and value.requires_grad for value in given)
    return call.name in NORMS_BY_NAME and len(call.inputs) == len(call.outputs) == 1 and not learns


def _has(call: Operation, module: nn.Module | None) -> bool:
    return module is None or _given(module, call.args, call.kwargs)


def _given(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    given = {id(value) for value in (*args, *kwargs.values())}
    return all(id(p) in given for p in module.parameters())


def site_of(passage: Passage, users: Mapping[int, Sequence[Operation]], frame: Frame) -> Site:
    """Follow the voltage to its nonlinearity: through sums with other branches, and pooling and the like.

    Where it only meets a scale and a shift before others hear it, that is its function.
    """
    slot, in_place, shape = passage.target, True, frame[passage.target].shape
    pool: MaxPool | None = None
    straight: Rate | None = None
    while following := users.get(slot, []):
        rate = rate_of(slot, users, frame) if in_place else None
        if rate is not None and is_bent(rate, users, frame):
            after = users.get(rate.outputs[0], [])
            if pool is None and len(after) == 1 and isinstance(after[0], MaxPool):
                pool = after[0]
            return Site(rate.phi, rate, pool)
        straight = straight or rate
        if len(following) != 1:
            break
        each = following[0]
        if isinstance(each, Rate):
            return Site(each.phi, each if in_place else None, pool)
        if isinstance(each, MaxPool) and slot == passage.target:
            pool = each
        if not isinstance(each, (Sum, Same, Reshape, Product)) and not each.name.startswith(_POOLING):
            break
        slot = each.outputs[0]
        in_place = in_place and isinstance(each, (Sum, Same)) and frame[slot].shape == shape
    return Site(Identity()) if straight is None else Site(straight.phi, straight)
