"""A control point on the way of a pass."""

from __future__ import annotations

from torch import Tensor

from dfc_lightning.operations.operation import Operation, Slot


class Passage(Operation):
    """A control point: what arrives there is handed on, driven by the apical compartment.

    Args:
        source: slot of what arrives, the basal voltage.
        target: slot of what is handed on, the somatic voltage.
    """

    index: int
    """Number of the point, in the order of the pass."""

    def __init__(self, source: Slot, target: Slot) -> None:
        super().__init__(hand_on, [source], {}, [source], [target])
        self.source, self.target = source, target


def hand_on(value: Tensor) -> Tensor:
    """What a point without control does."""
    return value
