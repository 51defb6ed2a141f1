"""The feedback weights of a network: made when a rule first needs them, kept, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dfc_lightning.errors import ControlError
from dfc_lightning.network.initial_feedback import FeedbackInit, initial_direct, initial_layerwise
from dfc_lightning.network.learning_rule import Direct, Layerwise
from dfc_lightning.passes.forward_pass import ForwardPass
from dfc_lightning.precision import full_precision
from dfc_lightning.recording.points import ControlPoint

Kind = Direct | Layerwise


class FeedbackWeights:
    """One feedback weight a control point: Q_i, (n_i, n_L), or B_i in the shape of W_i, empty where there is no W_i.

    Args:
        init: initial direct feedback weights; None for what the rule that first needs them is meant to have.
        seed: seed of random ones.
    """

    def __init__(self, init: FeedbackInit | None, seed: int) -> None:
        self.init, self.seed = init, seed
        self.kind: Kind | None = None
        self.values: list[nn.Parameter] = []
        self.average: Callable[[Tensor], Tensor] = lambda tensor: tensor
        """The mean of a tensor over processes, for feedback weights that start from activity."""
        self.carrying: Sequence[bool] = ()
        """Through which of the points errors travel back to others: where B_i has a use."""
        self._set_aside: dict[str, nn.Parameter] = {}

    def bind(self, forward: ForwardPass, points: Sequence[ControlPoint], kind: Kind | None) -> ForwardPass:
        """The pass bound to the feedback weights as they are now, made if there are none of that kind yet."""
        kind, output = kind or self.kind or Direct(), forward.output
        if not self.values or type(kind) is not type(self.kind):
            with torch.no_grad(), full_precision(output.device):
                made = self._made(kind, forward, points)
            before = self._set_aside if type(kind) is type(self.kind) else {}
            self.kind, self._set_aside = kind, {}
            self.values = [
                had if (had := before.get(p.name)) is not None and had.shape == q.shape else nn.Parameter(q)
                for p, q in zip(points, made)
            ]
        if len(self.carrying) != len(self.values):
            self.carrying = forward.hears
        for q in self.values:  # the module may have moved since
            if q.device != output.device or q.dtype != output.dtype:
                q.data = q.data.to(output)
        return forward.with_feedback([q.detach() for q in self.values], isinstance(self.kind, Layerwise))

    def _made(self, kind: Kind, forward: ForwardPass, points: Sequence[ControlPoint]) -> list[Tensor]:
        generator, output = torch.Generator().manual_seed(self.seed), forward.output
        if isinstance(kind, Direct):
            made = [self.average(q) for q in initial_direct(self.init or kind.init, forward, generator)]
            for point, q in zip(points, made):
                if not q.isfinite().all():
                    raise ControlError(
                        f"The initial feedback weights of {point.name!r} are not finite, as they come from weights or "
                        "a first batch that are too large or not finite. Look at both, or give feedback weights of "
                        "their own scale: feedback_init='xavier_normal'."
                    )
            return made
        return [
            output.new_empty(0) if w is None else initial_layerwise(kind.init, w, generator)
            for w in forward.layer_weights()
        ]

    def reorder(self, before: Sequence[ControlPoint], points: Sequence[ControlPoint]) -> None:
        """Give those loaded for some points to what a pass has shown the points to be.

        Raises:
            ControlError: these are others.
        """
        by_name = {p.name: q for p, q in zip(before, self.values)}
        if set(by_name) != {p.name for p in points}:
            raise other_network(by_name, [p.name for p in points])
        self.values = [by_name[p.name] for p in points]

    def set_aside(self, points: Sequence[ControlPoint]) -> None:
        """Have none any more, but take up again those of points that there will still be."""
        self._set_aside |= {p.name: q for p, q in zip(points, self.values)}
        self.values, self.carrying = [], ()

    def load(self, state: Mapping[str, Tensor], kind: Kind, order: Sequence[ControlPoint], dtype: torch.dtype) -> None:
        """Take over saved feedback weights for points in that order."""
        self.kind = kind
        self.values = [nn.Parameter(state[p.name].clone().to(p.parameters[0].device, dtype)) for p in order]


def other_network(loaded: Iterable[str], known: Iterable[str]) -> ControlError:
    """What to say of feedback weights for points that a network does not have."""
    return ControlError(
        f"The feedback weights to load are for the layers {sorted(loaded)}, but this network has {sorted(known)}. Load "
        "them into the network they were saved from."
    )


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
    # A normalisation may turn out to belong to the layer before it, and a layer to be used twice, or not by itself,
    # once a forward pass is seen.
    unsure = shapes is None and any(p.use for p in points)
    optional = {p.name for p in points if unsure or not p.is_layer} if shapes is None else set()
    names = {name.partition("#")[0] for name in state} if shapes is None else set(state)
    if not set(known) - optional <= names or not (unsure or names <= set(known)):
        raise other_network(state, known)
    used = points[0].layer, tuple(points[0].parameters[:1])
    order = [
        known.get(name) or ControlPoint(name, used[0], use=used[1]) for name in (state if shapes is None else known)
    ]
    outputs = {state[p.name].shape[-1] for p in order} if isinstance(kind, Direct) else set()
    for k, point in enumerate(order):
        shape, needed = tuple(state[point.name].shape), "the shape of its weight"
        if shapes is not None:
            fits, needed = shape == shapes[k], f"{shapes[k]}"
        elif isinstance(kind, Direct):  # how many units a map has is known by a forward pass only
            fits = len(shape) == 2 and len(outputs) == 1 and (point.width == 0 or shape[0] % point.width == 0)
            needed = f"rows that are a multiple of {point.width or 1}, and as many columns as the network has outputs"
        else:
            fits = not point.is_layer or not point.is_module or 0 in shape or shape == tuple(point.parameters[0].shape)
        if not fits:
            raise ControlError(
                f"The feedback weight to load for {point.name!r} has the shape {shape}, but the layer's units and "
                f"the network's outputs make {needed}. Load it into the network it was saved from."
            )
    return order
