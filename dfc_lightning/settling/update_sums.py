"""The mean update over the states that controlled dynamics pass through."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from typing import Any, Protocol

import torch
from torch import Tensor

from dfc_lightning.passes.dense import DensePass
from dfc_lightning.passes.forward_pass import ForwardPass
from dfc_lightning.passes.plasticity import Plasticity
from dfc_lightning.settling.dynamics import ControlledDynamics
from dfc_lightning.settling.settled import Taught
from dfc_lightning.settling.time_sum import ProductSums


class UpdateSums(Protocol):
    """A running sum of updates over time."""

    def add(self, dynamics: ControlledDynamics, times: int) -> None:
        """Count the present state in, so many times."""

    def totals(self) -> Taught:
        """The sum so far."""


def by_sample(signals: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
    """Signals, (B, …), times what each sample weighs, (B, 1)."""
    return [t * weight.view(-1, *[1] * (t.dim() - 1)) for t in signals]


@singledispatch
def update_sums(forward: ForwardPass, plasticity: Plasticity, scale: float) -> UpdateSums:
    """Sums of ``scale`` times the batch-mean update by ``plasticity`` in each state."""
    return GeneralSums(forward, plasticity, scale)


class GeneralSums:
    """For any network: the update is formed in every state, samples counted by ``weight``, (B, 1), if there is one."""

    def __init__(
        self, forward: ForwardPass, plasticity: Plasticity, scale: float, weight: Tensor | None = None
    ) -> None:
        self.forward, self.plasticity, self.scale, self.weight = forward, plasticity, scale, weight
        self._totals: Taught = []

    def add(self, dynamics: ControlledDynamics, times: int) -> None:
        state = dynamics.trail()
        signals = self.forward.postsynaptic(state, self.plasticity)
        if self.weight is not None:
            signals = by_sample(signals, self.weight)
        taught = self.forward.gradients(signals, self.forward.heard(state), self.scale * times)
        for totals, parts in zip(self._totals, taught):
            for total, part in zip(totals, parts):
                total.add_(part)
        self._totals = self._totals or taught

    def totals(self) -> Taught:
        return self._totals


class DenseSums:
    """For chains: what is presynaptic but does not move is multiplied once, at the end."""

    def __init__(self, forward: DensePass, plasticity: Plasticity, scale: float) -> None:
        self.forward, self.plasticity, self.scale = forward, plasticity, scale
        self._posts = [torch.zeros_like(v) for v in forward.v]
        self._moving = ProductSums(forward.v[1:], forward.v[:-1])

    def add(self, dynamics: ControlledDynamics, times: int) -> None:
        trail: Any = dynamics.trail(driven=self.plasticity != "rate_difference")
        signals = self.forward.postsynaptic(trail, self.plasticity)
        for post, t in zip(self._posts, signals):
            post.add_(t, alpha=times)
        self._moving.add(signals[1:], trail.rates[:-1], times)

    def totals(self) -> Taught:
        taught = self.forward.gradients(self._posts, scale=self.scale)
        for (weight, *_), part in zip(taught[1:], self._moving.totals()):
            weight.add_(part, alpha=self.scale / self.forward.batch_size)
        return taught


@update_sums.register
def _(forward: DensePass, plasticity: Plasticity, scale: float) -> UpdateSums:
    return DenseSums(forward, plasticity, scale)
