"""How a recorded network deviates from its feedforward pass under control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dfc_lightning.operations.layout import FIRST, Layout
from dfc_lightning.operations.operation import Deviations
from dfc_lightning.passes.forward_pass import Deviation
from dfc_lightning.passes.record import Record


@dataclass
class RecordedDeviation(Deviation):
    """How a controlled network deviates from feedforward.

    Args:
        driven: what drives each point beyond its input, in the shape of its voltage.
        moved: every deviation, by slot.
        record: what the slots are.
        layouts: where the samples lie in each.
        late: what has arrived at each point by now, less what has arrived when its soma last moved; None where
            transmission is instantaneous.
    """

    driven: list[Tensor]
    moved: Deviations
    record: Record
    layouts: Sequence[Layout]
    late: list[Tensor] | None = None

    @property
    def output(self) -> Tensor:
        found = self.moved[self.record.output]
        assert found is not None
        return slot_matrix(self.layouts, self.record.output, found)

    @property
    def basal(self) -> list[Tensor]:  # type: ignore[override]
        arriving = (slot_first(self.layouts, p.source, self.moved[p.source]) for p in self.record.passages)
        return [torch.zeros_like(d) if b is None else b for b, d in zip(arriving, self.driven)]

    def where(self, keep: Tensor, other: RecordedDeviation | None = None) -> RecordedDeviation:
        def choose(
            mine: Sequence[Tensor | None], others: Sequence[Tensor | None] | None, layouts: Sequence[Layout]
        ) -> list:
            if others is None:
                others = [None] * len(mine)
            return [_where(keep, a, b, layout) for a, b, layout in zip(mine, others, layouts)]

        first = [FIRST] * len(self.driven)
        return RecordedDeviation(
            choose(self.driven, None if other is None else other.driven, first),
            choose(self.moved, None if other is None else other.moved, self.layouts),
            self.record,
            self.layouts,
            None if self.late is None else choose(self.late, None if other is None else other.late, first),
        )


def slot_first(layouts: Sequence[Layout], slot: int, value: Tensor | None) -> Tensor | None:
    """A slot's tensor with the samples in its first dimension."""
    return None if value is None else layouts[slot].first(value)


def slot_matrix(layouts: Sequence[Layout], slot: int, value: Tensor) -> Tensor:
    """The output as (B, n_L)."""
    return value if layouts[slot] == FIRST else layouts[slot].first(value).flatten(1)


def _where(keep: Tensor, mine: Tensor | None, other: Tensor | None, layout: Layout) -> Tensor | None:
    if mine is None:
        return None
    other = torch.zeros_like(mine) if other is None else other
    if layout != FIRST:
        mine, other = layout.first(mine), layout.first(other)
    return layout.back(torch.where(keep.view(-1, *[1] * (mine.dim() - 1)), mine, other))
