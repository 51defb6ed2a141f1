"""What of a point direct feedback reaches: each unit, or for maps each channel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from dfc_lightning.errors import ControlError
from dfc_lightning.recording.points import ControlPoint

ConvFeedback = Literal["auto", "dense", "channel"]
CONV_FEEDBACK = ("auto", "dense", "channel")

DENSE_FEEDBACK_UP_TO = 2**20
"""The most feedback weights of a point whose every unit has its own; in float32 4 MB, and 8 MB in its optimizer."""

Port = tuple[int, ...]
"""The shape of a port: that of the point's voltage, or with ones where all positions hear the same."""


def port_layout(
    points: Sequence[ControlPoint], shapes: Sequence[Port], outputs: int, conv_feedback: ConvFeedback
) -> tuple[Port, ...]:
    """The ports that a network's points are to have.

    Args:
        points: the control points.
        shapes: of their voltages, without the samples.
        outputs: n_L.
        conv_feedback: see :class:`ControlledNetwork`.
    """
    found = []
    for point, shape in zip(points, shapes):
        large = math.prod(shape) * outputs > DENSE_FEEDBACK_UP_TO
        compact = len(shape) > 1 and (conv_feedback == "channel" or (conv_feedback == "auto" and large))
        found.append(_shared(point, shape) if compact else tuple(shape))
    return tuple(found)


def ports_of(
    points: Sequence[ControlPoint], shapes: Sequence[Port], outputs: int, feedback: Sequence[Tensor]
) -> tuple[Port, ...]:
    """How the rows of given feedback weights Q_i are laid out to be added to the voltages.

    Raises:
        ControlError: a feedback weight fits neither all units nor the channels of its point.
    """
    found = []
    for point, shape, q in zip(points, shapes, feedback):
        layouts = (tuple(shape), _shared(point, shape))
        fitting = [layout for layout in layouts if tuple(q.shape) == (math.prod(layout), outputs)]
        if not fitting:
            raise ControlError(
                f"The feedback weight of {point.name!r} has the shape {tuple(q.shape)}, but the layer has voltages of "
                f"the shape {tuple(shape)} and the network {outputs} outputs. Load it into the network it was saved "
                "from."
            )
        found.append(fitting[0])
    return tuple(found)


def _shared(point: ControlPoint, shape: Sequence[int]) -> Port:
    """The shape of a port whose positions all hear the same."""
    if point.use:
        parameter = point.multiplies if point.multiplies is not None else point.use[0]
        last = parameter.dim() < 3 and parameter.shape[-1:] != (1,)
    else:
        last = isinstance(point.norm or point.layer, (nn.Linear, nn.LayerNorm, nn.RMSNorm))
    return (*[1] * (len(shape) - 1), shape[-1]) if last else (shape[0], *[1] * (len(shape) - 1))
