"""Layer and root-mean-square normalisation under control, without losing the digits of a small deviation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dfc_lightning.operations.operation import Deviations, Frame, Operation, constant


class LayerNorm(Operation):
    """y = γ x̂ + β with x̂ = (x − mean x) / σ over the last dimensions; of RMSNorm without the mean.

    Args:
        centred: whether the mean is taken away.
    """

    def __init__(self, *args: Any, centred: bool) -> None:
        super().__init__(*args)
        self.centred = centred
        self.dims = tuple(range(-len(self.arguments["normalized_shape"]), 0))

    def deviations(self, frame: Frame, moved: Deviations) -> Sequence[Tensor | None]:
        x, inverse = self._parts(frame)
        d = self._less_mean(self._moved(moved))
        grown = (d * (2 * x + d)).mean(self.dims, keepdim=True)  # of σ²
        later = (inverse.pow(-2) + grown).rsqrt()
        change = -grown * (inverse * later).square() / (inverse + later)  # 1/σ' − 1/σ
        return [self._weighed(torch.addcmul(d * later, x, change), frame)]

    def tangents(self, frame: Frame, moved: Deviations) -> Sequence[Tensor | None]:
        x, inverse = self._parts(frame)
        d, normed = self._less_mean(self._moved(moved)), x * inverse
        return [self._weighed((d - normed * (normed * d).mean(self.dims, keepdim=True)) * inverse, frame)]

    def pulled(self, frame: Frame, errors: Sequence[Tensor | None], live: bool = False) -> Sequence[Tensor | None]:
        error, layout = errors[0], frame.layouts[self.inputs[0]]
        assert error is not None
        x, inverse = self._parts(frame)
        normed, error = x * inverse, self._weighed(error, frame)
        along = layout.weighed(error, normed).mean(self.dims, keepdim=True)
        across = layout.weighed(along.expand_as(error), normed)
        return [layout.weighed(self._less_mean(error) - across, inverse.expand_as(normed))]

    def _parts(self, frame: Frame) -> tuple[Tensor, Tensor]:
        """Both x − mean x and 1/σ."""

        def make() -> tuple[Tensor, Tensor]:
            x = self._less_mean(frame[self.inputs[0]])
            return x, (x.square().mean(self.dims, keepdim=True) + self.arguments.get("eps", 1e-5)).rsqrt()

        return frame.once((self, "parts"), make)  # type: ignore[no-any-return]

    def _moved(self, moved: Deviations) -> Tensor:
        change = moved[self.inputs[0]]
        assert change is not None
        return change

    def _less_mean(self, value: Tensor) -> Tensor:
        return value - value.mean(self.dims, keepdim=True) if self.centred else value

    def _weighed(self, value: Tensor, frame: Frame) -> Tensor:
        weight = self.arguments.get("weight")
        return value if weight is None else value * constant(weight, frame.dtype)
