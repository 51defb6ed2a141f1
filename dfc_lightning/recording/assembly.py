"""What a recorded pass says of a control point: its parameters' part in it, and where its voltage becomes a rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from dfc_lightning.errors import ControlError
from dfc_lightning.operations.linear import Product, Reshape, Same, Sum, Weighted
from dfc_lightning.operations.max_pool import MaxPool
from dfc_lightning.operations.nonlinearity import Identity
from dfc_lightning.operations.operation import Frame, Operation
from dfc_lightning.operations.passage import Passage
from dfc_lightning.operations.rate import Rate
from dfc_lightning.passes.record import Site
from dfc_lightning.passes.segment import LAYERS, Segment
from dfc_lightning.recording.composed import is_bent, rate_of
from dfc_lightning.recording.points import ControlPoint

_NORMS = ("batch_norm", "group_norm", "layer_norm", "rms_norm", "instance_norm")
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
        plain = plain and norm.name in _NORMS and _has(norm, normed)
    if not plain:
        raise ControlError(
            f"The layer {point.name!r} does more than multiply its input with its weights. Feedback control teaches "
            "torch's own linear and convolutional layers and normalisations; name it in extra_points=['…'], or freeze "
            "it with requires_grad_(False)."
        )
    return Segment(
        layer if isinstance(layer, Weighted) else None,
        norm,
        point.layer.weight if layer is not None else None,  # type: ignore[arg-type]
        point.layer.bias if layer is not None else None,  # type: ignore[arg-type]
        getattr(normed, "weight", None),
        getattr(normed, "bias", None),
    )


def is_untaught_norm(call: Operation) -> bool:
    """Whether it is a normalisation, of a module or not, with nothing in it that learns."""
    given = (*call.args, *call.kwargs.values())
    learns = any(isinstance(value, nn.Parameter) and value.requires_grad for value in given)
    return call.name in _NORMS and len(call.inputs) == len(call.outputs) == 1 and not learns


def _has(call: Operation, module: nn.Module | None) -> bool:
    """Whether a call was given a module's own parameters, as they are."""
    given = [id(value) for value in (*call.args, *call.kwargs.values())]
    return all(id(p) in given for p in (module.parameters(recurse=False) if module is not None else ()))


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
