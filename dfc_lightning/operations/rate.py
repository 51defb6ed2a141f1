"""An elementwise nonlinearity between two points, or after one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dfc_lightning.operations.nonlinearity import Nonlinearity
from dfc_lightning.operations.operation import Deviations, Frame, Operation


class Rate(Operation):
    """An elementwise nonlinearity φ.

    Args:
        phi: φ.
    """

    def __init__(self, *args: Any, phi: Nonlinearity) -> None:
        super().__init__(*args)
        self.phi = phi

    def values(self, frame: Frame) -> Sequence[Tensor]:
        return [self.phi(frame[self.inputs[0]])]

    def deviations(self, frame: Frame, moved: Deviations) -> Sequence[Tensor | None]:
        source = self.inputs[0]
        change = moved[source]
        assert change is not None
        return [self.phi.difference(frame[source], frame[self.outputs[0]], change, self.slope(frame))]

    def tangents(self, frame: Frame, moved: Deviations) -> Sequence[Tensor | None]:
        change = moved[self.inputs[0]]
        assert change is not None
        return [self.slope(frame) * change]

    def pulled(self, frame: Frame, errors: Sequence[Tensor | None], live: bool = False) -> Sequence[Tensor | None]:
        error = errors[0]
        assert error is not None
        if frame.reach is not None:
            return [self.phi.secant(frame[self.inputs[0]], error, frame.reach)]
        return [frame.layouts[self.outputs[0]].weighed(error, self.slope(frame))]

    def slope(self, frame: Frame) -> Tensor:
        """φ' at the frame's values."""
        return frame.once(self, lambda: self.phi.slope(frame[self.inputs[0]], frame[self.outputs[0]]))
