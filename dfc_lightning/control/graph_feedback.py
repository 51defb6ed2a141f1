"""Feedback weights of networks of any shape: how many a point has, and where they start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from dfc_lightning.control.checks import ControlError
from dfc_lightning.control.feedback import FeedbackInit, pseudoinverse_mean, random_feedback
from dfc_lightning.control.graph import Graph
from dfc_lightning.control.points import ControlPoint
from dfc_lightning.control.wiring import GraphActivity

ConvFeedback = Literal["auto", "dense", "channel"]
CONV_FEEDBACK = ("auto", "dense", "channel")

DENSE_FEEDBACK_UP_TO = 2**20
"""The most feedback weights of a point whose every unit has its own; in float32 4 MB, and 8 MB in its optimizer."""

SAMPLES_AT_ONCE = 32
"""Samples of the first batch whose Jacobians are held at a time."""


def port_shapes(
    points: Sequence[ControlPoint],
    shapes: Sequence[Sequence[int]],
    feedback: Sequence[Tensor],
    outputs: int | None = None,
) -> list[tuple[int, ...]]:
    """How the rows of each Q_i are laid out to be added to the voltage.

    Args:
        points: the control points.
        shapes: of their voltages, without the samples.
        feedback: Q_i, (n_i, n_L).
        outputs: n_L; None for what the feedback has it.

    Raises:
        ControlError: a feedback weight fits neither all units nor the channels of its point.
    """
    found: list[tuple[int, ...]] = []
    for point, shape, q in zip(points, shapes, feedback):
        layouts = (tuple(shape), _shared(point, shape))
        fitting = [layout for layout in layouts if math.prod(layout) == q.shape[0]]
        if fitting and q.shape[1] == (outputs or q.shape[1]):
            found.append(fitting[0])
        else:
            raise ControlError(
                f"The feedback weight of {point.name!r} has the shape {tuple(q.shape)}, but the layer has voltages of "
                f"the shape {tuple(shape)} and the network {outputs} outputs. Load it into the network it was saved "
                "from."
            )
    return found


def _shared(point: ControlPoint, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a port whose positions all hear the same."""
    last = isinstance(point.norm or point.layer, (nn.Linear, nn.LayerNorm, nn.RMSNorm))
    return (*[1] * (len(shape) - 1), shape[-1]) if last else (shape[0], *[1] * (len(shape) - 1))


def initial_graph_feedback(
    kind: FeedbackInit,
    points: Sequence[ControlPoint],
    activity: GraphActivity,
    conv_feedback: ConvFeedback,
    generator: torch.Generator,
) -> list[Tensor]:
    """Feedback weights for the points of a graph; the identity where a point is the network's output itself.

    Args:
        kind: ``"weight_product"``: the mean of J_iᵀ over samples, what the product of transposed weights is to a chain
            of linear layers; ``"jacobian"``: the mean of J_iᵀ(JJᵀ + γI)⁻¹; else random, see :func:`initial_feedback`.
        points: the control points.
        activity: a feedforward pass.
        conv_feedback: see :class:`ControlledNetwork`.
        generator: source of the random kinds, on the CPU.
    """
    outputs = activity.output.shape[1]
    shapes = [tuple(v.shape[1:]) for v in activity.v]
    spreads = []
    for point, shape in zip(points, shapes):
        large = math.prod(shape) * outputs > DENSE_FEEDBACK_UP_TO
        compact = len(shape) > 1 and (conv_feedback == "channel" or (conv_feedback == "auto" and large))
        spreads.append(_shared(point, shape) if compact else shape)
    empty = [activity.output.new_zeros(math.prod(s), outputs) for s in spreads]
    last = [p.target == activity.wiring.output for p in activity.wiring.passages]
    if kind in ("weight_product", "jacobian"):
        graph = Graph(empty, shapes, spreads)
        found = empty
        for some in torch.arange(activity.batch_size, device=activity.output.device).split(SAMPLES_AT_ONCE):
            jacobians, share = graph.jacobians(activity.samples(some)), len(some) / activity.batch_size
            means = pseudoinverse_mean(jacobians) if kind == "jacobian" else [j.mean(0).T for j in jacobians]
            found = [q + share * mean for q, mean in zip(found, means)]
        if kind == "jacobian":
            return found
    else:
        found = [random_feedback(kind, q, generator) for q in empty]
    return [torch.eye(outputs).to(q) if direct else q for q, direct in zip(found, last)]


def check_samples_are_independent(activity: GraphActivity) -> None:
    """See that each operation of the pass gives some samples what it gave them among all.

    Raises:
        ControlError: it does not: samples depend on each other, or on their place in the batch.
    """
    for each in activity.wiring.program:
        if any(activity.frame[s].shape[:1] != activity.output.shape[:1] for s in (*each.inputs, *each.outputs)):
            raise _entangled(each.name)
    keep = torch.arange(0, activity.batch_size, 2, device=activity.output.device)
    frame = activity.samples(keep).frame
    rtol = 1e-3 if frame.dtype == torch.float32 else 1e-8
    for each in activity.wiring.program:
        try:
            values = each.values(frame)
        except (RuntimeError, ValueError, IndexError) as error:
            raise _entangled(each.name, f" ({error})") from error
        for slot, value in zip(each.outputs, values):
            seen = frame[slot]
            if value.shape != seen.shape or not _alike(value, seen, rtol):
                raise _entangled(each.name)


def _alike(value: Tensor, seen: Tensor, rtol: float) -> bool:
    if not seen.is_floating_point():
        return torch.equal(value, seen)
    return torch.allclose(value, seen, rtol, rtol * float(seen.abs().max()))


def _entangled(name: str, cause: str = "") -> ControlError:
    return ControlError(
        f"The operation {name} gives a sample another value without the other samples{cause}. Feedback control settles "
        "each sample by itself; of what mixes samples only batch normalisation can be held. Write shapes with -1 or "
        "x.shape[0] for the batch, or freeze the layers before it with requires_grad_(False)."
    )
