"""Settling where the controller sees e = y − g(r_L), g the output's own nonlinearity: a pass that ends with it."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from dfc_lightning.losses.link import Link, change, slope
from dfc_lightning.passes.forward_pass import Deviation, ForwardPass
from dfc_lightning.settling.controller import PIController
from dfc_lightning.settling.settled import Settled, Settling


def settle_linked(
    settling: Settling, forward: ForwardPass, offset: Tensor, controller: PIController, link: Link
) -> Settled:
    """Settle where e = y − g(r_L) is what the controller sees.

    Args:
        settling: a method that solves for the steady state.
        forward: the feedforward pass.
        offset: e at the start, y − g(r_L⁻), (B, n_L).
        controller: the controller.
        link: g.
    """
    if link == "identity":
        return settling.settle(forward, offset, controller)
    settled = settling.settle(cast(ForwardPass, LinkedPass(forward, link)), offset, controller)
    settled.response = cast(LinkedDeviation, settled.response).inner
    return settled


class LinkedDeviation(Deviation):
    """How the controlled network deviates, with Δg(r_L) for its output."""

    def __init__(self, inner: Deviation, at_rest: Tensor, link: Link) -> None:
        self.inner, self.at_rest, self.link = inner, at_rest, link
        self.driven, self.basal = inner.driven, inner.basal

    @property
    def output(self) -> Tensor:
        return change(self.link, self.at_rest, self.inner.output)

    def where(self, keep: Tensor, other: LinkedDeviation | None = None) -> LinkedDeviation:
        return LinkedDeviation(self.inner.where(keep, None if other is None else other.inner), self.at_rest, self.link)


class LinkedPass:
    """A pass whose output is g of its network's, as far as a solver of the steady state asks.

    All else is that of the network's own pass.

    Args:
        inner: that pass.
        link: g.
    """

    def __init__(self, inner: ForwardPass, link: Link) -> None:
        self.inner, self.link = inner, link

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def samples(self, index: Tensor) -> LinkedPass:
        return LinkedPass(self.inner.samples(index), self.link)

    def respond(self, driven: list[Tensor]) -> LinkedDeviation:
        return LinkedDeviation(self.inner.respond(driven), self.inner.output, self.link)

    def linear_response(self, driven: list[Tensor]) -> Tensor:
        return (self._slope() @ self.inner.linear_response(driven).unsqueeze(2)).squeeze(2)

    def gain(self, at: LinkedDeviation | None = None) -> Tensor:
        """∂g/∂r_L JQ, (B, n_L, n_L)."""
        return self._slope(at) @ self.inner.gain(None if at is None else at.inner)

    def mean_gain(self) -> Tensor:
        return self._slope() @ self.inner.mean_gain()

    def _slope(self, at: LinkedDeviation | None = None) -> Tensor:
        """∂g/∂r_L of each sample."""
        return slope(self.link, self.inner.output if at is None else self.inner.output + at.inner.output)
