"""Max-pooling under control."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfc_lightning.control.operations import Deviations, Frame, Operation


class MaxPool(Operation):
    """Max-pooling of maps of one, two or three dimensions.

    With x_o the entry at offset o of a window and y⁻ the largest, the change is the largest of (x_o⁻ − y⁻) + δ_o.

    Args:
        dims: of the maps.
    """

    def __init__(self, *args: Any, dims: int) -> None:
        super().__init__(*args)
        named = dict(zip(("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode"), self.args))
        named |= self.kwargs

        def each(name: str, default: Any) -> list[int]:
            value = named.get(name)
            value = default if value is None or value == [] else value
            return list(value) if isinstance(value, (tuple, list)) else [value] * dims

        self.kernel = each("kernel_size", 1)
        self.stride, self.padding = each("stride", self.kernel), each("padding", 0)
        self.dilation = each("dilation", 1)

    def deviations(self, frame: Frame, moved: Deviations) -> Sequence[Tensor | None]:
        x, y, change = frame[self.inputs[0]], frame[self.outputs[0]], moved[self.inputs[0]]
        assert change is not None
        gaps = frame.once(self, lambda: [e - y for e in self._entries(x, y.shape[2:], -torch.inf)])
        largest: Tensor | None = None
        for gap, entry in zip(gaps, self._entries(change, y.shape[2:], 0.0)):
            reached = gap + entry
            largest = reached if largest is None else torch.maximum(largest, reached, out=largest)
        return [largest]

    def tangents(self, frame: Frame, moved: Deviations) -> Sequence[Tensor | None]:
        x, size, change = frame[self.inputs[0]], frame[self.outputs[0]].shape[2:], moved[self.inputs[0]]
        assert change is not None
        where = frame.once(
            (self, "winner"), lambda: torch.stack(self._entries(x, size, -torch.inf)).argmax(0, keepdim=True)
        )
        return [torch.stack(self._entries(change, size, 0.0)).gather(0, where).squeeze(0)]

    def wins(self, frame: Frame) -> Tensor:
        """In how many windows each entry is the largest, in the shape of the argument."""
        return frame.once((self, "wins"), lambda: self._wins(frame[self.inputs[0]], frame[self.outputs[0]]))

    def _wins(self, x: Tensor, y: Tensor) -> Tensor:
        count = torch.zeros_like(x)
        places = self._entries(torch.arange(x[0, 0].numel(), device=x.device).view(1, 1, *x.shape[2:]), y.shape[2:], -1)
        free = torch.ones_like(y, dtype=torch.bool)
        for entry, place in zip(self._entries(x, y.shape[2:], -torch.inf), places):
            won = free & (entry == y)
            free &= ~won
            inside = place.flatten() >= 0
            count.flatten(2).index_add_(2, place.flatten()[inside], won.flatten(2)[..., inside].to(x))
        return count

    def _entries(self, x: Tensor, size: Sequence[int], outside: float) -> list[Tensor]:
        """The entries of all windows at each offset, in the shape of the result."""
        reach = [s * (n - 1) + 1 for s, n in zip(self.stride, size)]
        need = [r + d * (k - 1) for r, d, k in zip(reach, self.dilation, self.kernel)]
        after = [max(0, n - p - m) for n, p, m in zip(need, self.padding, x.shape[2:])]
        if any(self.padding) or any(after):
            x = F.pad(x, [n for pair in zip(reversed(self.padding), reversed(after)) for n in pair], value=outside)
        offsets = itertools.product(*(range(0, d * k, d) for d, k in zip(self.dilation, self.kernel)))
        found = []
        for offset in offsets:
            each: Any = (slice(o, o + r, s) for o, r, s in zip(offset, reach, self.stride))
            found.append(x[(..., *each)])
        return found
