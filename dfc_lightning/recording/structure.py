"""What the forward passes so far have shown of a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from dfc_lightning.errors import ControlError
from dfc_lightning.operations.nonlinearity import Nonlinearity
from dfc_lightning.recording.points import ControlPoint


class Link(NamedTuple):
    """What lies between a layer of a chain and the next."""

    nonlinearity: Nonlinearity
    overwrites: bool
    """Whether it works in place and destroys the voltage."""


@dataclass(frozen=True)
class Structure:
    """A network as its passes were: the same layers in the same order, whatever the mode.

    Args:
        points: the control points, in the order of the pass.
        shapes: of their voltages, without the samples.
        ports: of each point, the shape of what direct feedback reaches of it.
        outputs: n_L.
        outputs_at: which points are the output.
        chains: by whether the module was in training mode, the links of a chain of dense layers, or None where it
            is none; a mode that is missing has not been seen.
    """

    points: tuple[ControlPoint, ...]
    shapes: tuple[tuple[int, ...], ...]
    ports: tuple[tuple[int, ...], ...]
    outputs: int
    outputs_at: tuple[int, ...]
    chains: Mapping[bool, Sequence[Link] | None] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Of the points, in order."""
        return [point.name for point in self.points]

    def with_mode(self, training: bool, chain: Sequence[Link] | None) -> Structure:
        """The same, seen in a mode."""
        return replace(self, chains={**self.chains, training: chain})

    def check(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> None:
        """See that a later pass is like the first.

        Raises:
            ControlError: it ran other layers, or in another order, or with inputs of another shape.
        """
        if list(shapes) != list(self.shapes) or list(names) != self.names:
            raise ControlError(
                f"The layers {list(names)} with voltages of the shapes {list(shapes)} were run in this step, but "
                f"{self.names} with {list(self.shapes)} in the first one. Feedback control needs the same layers in "
                "the same order, and inputs of the same shape, in every step."
            )
