"""What is kept of a controlled network: saved feedback weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dfc_lightning.control.checks import ControlError
from dfc_lightning.control.points import ControlPoint


def matched(
    state: dict[str, Tensor],
    points: Sequence[ControlPoint],
    is_graph: bool,
    shapes: Sequence[tuple[int, ...]] | None,
) -> tuple[list[ControlPoint], bool]:
    """The points that saved feedback weights are for, in order, and whether the network is a graph by them.

    Args:
        state: the feedback weights, by the names of the points.
        points: the network's points.
        is_graph: whether it is known to be a graph.
        shapes: shapes of its feedback weights; None before the first forward pass.

    Raises:
        ControlError: they belong to another network.
    """
    seen = shapes is not None
    known = {point.name: point for point in points}
    # A normalisation of a graph may turn out to belong to the layer before it, once a forward pass is seen.
    optional = set() if seen or not is_graph else {p.name for p in points if not p.is_layer}
    if not set(known) - optional <= set(state) <= set(known):
        raise ControlError(
            f"The feedback weights to load are for the layers {sorted(state)}, but this network has "
            f"{sorted(known)}. Load them into the network they were saved from."
        )
    # The order saved is the order of the network, if no forward pass has shown it yet.
    order = list(points) if seen else [known[name] for name in state]
    is_graph = is_graph or (not seen and _of_no_chain(order, state))
    outputs = next(reversed(state.values())).shape[1] if is_graph else order[-1].width
    for k, point in enumerate(order):
        shape: tuple[int, ...] = tuple(state[point.name].shape)
        needed: tuple[int, ...] = (point.width, outputs)
        if is_graph:  # how many units a map has is known by a forward pass only
            needed = shapes[k] if shapes is not None else (shape[0], outputs)
        if shape != needed:
            raise ControlError(
                f"The feedback weight to load for {point.name!r} has the shape {shape}, but the layer's units and "
                f"the network's outputs make {needed}. Load it into the network it was saved from."
            )
    return order, is_graph


def _of_no_chain(order: list[ControlPoint], state: dict[str, Tensor]) -> bool:
    """Whether feedback weights are such as dense layers have only where these are no chain."""
    outputs, rows = {q.shape[1] for q in state.values()}, [(len(state[p.name]), p.width) for p in order]
    chain = outputs == {order[-1].width} and all(n == width for n, width in rows)
    return not chain and len(outputs) == 1 and all(n % width == 0 for n, width in rows)
