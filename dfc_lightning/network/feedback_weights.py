"""Saved feedback weights: whose they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from dfc_lightning.errors import ControlError
from dfc_lightning.network.learning_rule import Direct, Layerwise
from dfc_lightning.recording.points import ControlPoint


def in_order(
    state: Mapping[str, Tensor],
    points: Sequence[ControlPoint],
    kind: Direct | Layerwise,
    shapes: Sequence[tuple[int, ...]] | None = None,
) -> list[ControlPoint]:
    """The points that saved feedback weights are for, in their order.

    Args:
        state: the feedback weights, by the names of the points.
        points: the network's points, in the order of its passes if one has been seen.
        kind: what feedback weights they are.
        shapes: of the network's own feedback weights, if it has some.

    Raises:
        ControlError: they belong to another network.
    """
    known = {point.name: point for point in points}
    # A normalisation may turn out to belong to the layer before it, once a forward pass is seen.
    optional = {p.name for p in points if not p.is_layer} if shapes is None else set()
    if not set(known) - optional <= set(state) <= set(known):
        raise ControlError(
            f"The feedback weights to load are for the layers {sorted(state)}, but this network has "
            f"{sorted(known)}. Load them into the network they were saved from."
        )
    order = [known[name] for name in state] if shapes is None else list(points)
    outputs = {state[p.name].shape[-1] for p in order} if isinstance(kind, Direct) else set()
    for k, point in enumerate(order):
        shape, needed = tuple(state[point.name].shape), "the shape of its weight"
        if shapes is not None:
            fits, needed = shape == shapes[k], f"{shapes[k]}"
        elif isinstance(kind, Direct):  # how many units a map has is known by a forward pass only
            fits = len(shape) == 2 and len(outputs) == 1 and (point.width == 0 or shape[0] % point.width == 0)
            needed = f"rows that are a multiple of {point.width or 1}, and as many columns as the network has outputs"
        else:
            fits = not point.is_layer or point.is_named or shape == tuple(point.parameters[0].shape)
        if not fits:
            raise ControlError(
                f"The feedback weight to load for {point.name!r} has the shape {shape}, but the layer's units and "
                f"the network's outputs make {needed}. Load it into the network it was saved from."
            )
    return order
