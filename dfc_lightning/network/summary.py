"""What is controlled, point by point: layers, voltages, parameters and feedback weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dfc_lightning.network.learning_rule import Direct, Layerwise
from dfc_lightning.recording.points import ControlPoint
from dfc_lightning.recording.structure import Structure


@dataclass(frozen=True)
class PointSummary:
    """A control point in words and numbers.

    Args:
        name: the layer's name in the module.
        type: its class, and that of the normalisation that belongs to it.
        voltage: shape of v_i without the samples; None before a pass has shown it.
        parameters: how many it has.
        feedback: how feedback reaches it: ``"dense"``, a row of Q_i for each unit; ``"channel"``, one for each channel;
            ``"layered"``, by B_i from the layers above; or nothing.
        shape: of its feedback weight.
    """

    name: str
    type: str
    voltage: tuple[int, ...] | None
    parameters: int
    feedback: str
    shape: tuple[int, ...] | None

    @property
    def feedback_weights(self) -> int:
        """How many there are."""
        return 0 if self.shape is None else math.prod(self.shape)


def summarised(
    points: Sequence[ControlPoint],
    structure: Structure | None,
    kind: Direct | Layerwise | None,
    feedback: Sequence[Tensor],
) -> list[PointSummary]:
    """A summary of each point.

    Args:
        points: the control points.
        structure: what passes have shown of them; None before the first.
        kind: the feedback weights that there are.
        feedback: them, one a point; none before they are made.
    """
    shapes = [None] * len(points) if structure is None else structure.shapes
    found = []
    for i, (point, voltage) in enumerate(zip(points, shapes)):
        shape = tuple(feedback[i].shape) if feedback and feedback[i].numel() else None
        way = ""
        if shape is not None:
            shared = structure is not None and tuple(structure.ports[i]) != tuple(structure.shapes[i])
            way = "layered" if isinstance(kind, Layerwise) else "channel" if shared else "dense"
        modules = [point.layer, point.norm]
        named = " + ".join(type(module).__name__ for module in modules if module is not None)
        count = sum(p.numel() for p in point.parameters)
        found.append(PointSummary(point.name or "(the module)", named, voltage, count, way, shape))
    return found


def times(shape: Sequence[int] | None, unknown: str = "?") -> str:
    """A shape as it is written, 64 × 10; ``unknown`` for None."""
    return unknown if shape is None else " × ".join(map(str, shape))
