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
        size, change = frame[self.outputs[0]].shape[2:], moved[self.inputs[0]]
        assert change is not None
        total: Tensor | None = None
        for won, entry in zip(self._won(frame), self._entries(change, size, 0.0)):
            total = won * entry if total is None else total.addcmul_(won, entry)
        return [total]

    def wins(self, frame: Frame) -> Tensor:
        """In how many windows each entry is the largest, in the shape of the argument."""
        return frame.once((self, "wins"), lambda: self._wins(frame))

    def _wins(self, frame: Frame) -> Tensor:
        x, size = frame[self.inputs[0]], frame[self.outputs[0]].shape[2:]
        count = self._padded(torch.zeros_like(x), size, 0.0)
        for won, place in zip(self._won(frame), self._places(size)):
            count[place] += won
        inside: Any = (..., *(slice(p, p + n) for p, n in zip(self.padding, x.shape[2:])))
        return count[inside]

    def _won(self, frame: Frame) -> list[Tensor]:
        """1 where the entry at an offset is the largest of its window, the first of equals, for each offset."""

        def find() -> list[Tensor]:
            x, y = frame[self.inputs[0]], frame[self.outputs[0]]
            free, found = torch.ones_like(y, dtype=torch.bool), []
            for entry in self._entries(x, y.shape[2:], -torch.inf):
                won = free & (entry == y)
                free &= ~won
                found.append(won.to(y))
            return found

        return frame.once((self, "won"), find)

    def _entries(self, x: Tensor, size: Sequence[int], outside: float) -> list[Tensor]:
        """The entries of all windows at each offset, in the shape of the result."""
        padded = self._padded(x, size, outside)
        return [padded[place] for place in self._places(size)]

    def _padded(self, x: Tensor, size: Sequence[int], outside: float) -> Tensor:
        """The argument with all that its windows reach."""
        need = [s * (n - 1) + 1 + d * (k - 1) for s, n, d, k in zip(self.stride, size, self.dilation, self.kernel)]
        after = [max(0, n - p - m) for n, p, m in zip(need, self.padding, x.shape[2:])]
        if not any(self.padding) and not any(after):
            return x
        return F.pad(x, [n for pair in zip(reversed(self.padding), reversed(after)) for n in pair], value=outside)

    def _places(self, size: Sequence[int]) -> list[Any]:
        """For each offset in a window, where the entries at that offset lie in the padded argument."""
        reach = [s * (n - 1) + 1 for s, n in zip(self.stride, size)]
        offsets = itertools.product(*(range(0, d * k, d) for d, k in zip(self.dilation, self.kernel)))
        return [(..., *(slice(o, o + r, s) for o, r, s in zip(each, reach, self.stride))) for each in offsets]
