"""Max-pooling under control."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfc_lightning.operations.operation import Deviations, Frame, Operation


class MaxPool(Operation):
    """Max-pooling of maps of one, two or three dimensions.

    With x_o the entry at offset o of a window and y⁻ the largest, the change is the largest of (x_o⁻ − y⁻) + δ_o.

    Args:
        dims: of the maps.
    """

    def __init__(self, *args: Any, dims: int) -> None:
        super().__init__(*args)

        def each(name: str, default: Any) -> list[int]:
            value = self.arguments.get(name)
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

    def pulled(self, frame: Frame, errors: Sequence[Tensor | None], live: bool = False) -> Sequence[Tensor | None]:
        (error,), x = errors, frame[self.inputs[0]]
        assert error is not None
        weighed = frame.layouts[self.outputs[0]].weighed
        return [self._scattered([weighed(error, won) for won in self._won(frame)], x, error.shape[2:])]

    def wins(self, frame: Frame) -> Tensor:
        """In how many windows each entry is the largest, in the shape of the argument."""
        return frame.once((self, "wins"), lambda: self._wins(frame))

    def _wins(self, frame: Frame) -> Tensor:
        return self._scattered(self._won(frame), frame[self.inputs[0]], frame[self.outputs[0]].shape[2:])

    def _scattered(self, entries: Sequence[Tensor], x: Tensor, size: Sequence[int]) -> Tensor:
        """What is given for the entries at each offset, added up where the entries lie in ``x``."""
        total = self._padded(x.new_zeros(*entries[0].shape[:2], *x.shape[2:]), size, 0.0)
        for entry, place in zip(entries, self._places(size)):
            total[place] += entry
        inside: Any = (..., *(slice(p, p + n) for p, n in zip(self.padding, x.shape[2:])))
        return total[inside]

    def _won(self, frame: Frame) -> list[Tensor]:
        """1 where the entry at an offset is the largest of its window, the first of equals, for each offset."""

        def find() -> list[Tensor]:
            entries = self._entries(frame[self.inputs[0]], frame[self.outputs[0]].shape[2:], -torch.inf)
            largest = functools.reduce(torch.maximum, entries)  # a controlled result is this but for rounding
            free, found = torch.ones_like(largest, dtype=torch.bool), []
            for entry in entries:
                won = free & (entry == largest)
                free &= ~won
                found.append(won.to(largest))
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
