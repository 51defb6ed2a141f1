"""The output's own nonlinearity g, by which the error of a label is e = y − g(r_L), and a pass that ends with it."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor

from dfc_lightning.errors import ControlError
from dfc_lightning.passes.forward_pass import Deviation, ForwardPass
from dfc_lightning.settling.controller import PIController
from dfc_lightning.settling.settled import Settled, Settling

Link = Literal["softmax", "identity"]
LINKS = ("softmax", "identity")

ROUNDING = 0.05
"""By how much a label may leave the probabilities that it is to be, after gradients in bfloat16."""


def linked(link: Link, output: Tensor) -> Tensor:
    """g(r_L), (B, n_L)."""
    return torch.softmax(output, dim=1) if link == "softmax" else output


def refuse_other_losses(link: Link, forward: ForwardPass, loss_grad: Tensor) -> None:
    """Raise a :class:`ControlError` if the labels behind ∂ℓ_b/∂r_L, (B, n_L), are no probabilities, as they have to be.

    By cross entropy ∂ℓ_b/∂r_L = g(r_L) − y. Of squared errors any label is as good as another.
    """
    if link == "identity":
        return
    label = linked(link, forward.output) - loss_grad
    sound = (label.min() > -ROUNDING) & (label.sum(1) - 1).abs().max().lt(ROUNDING)
    if not bool(sound):
        raise ControlError(
            "The loss is not the cross entropy of the network's outputs as logits, each sample's with weight one: the "
            f"labels that its gradient tells of would be {label[0].tolist()} in the first sample. Give the rule "
            "link='identity' if it is half a squared error, or train by DFC(), which takes any loss."
        )


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
    settled = settling.settle(cast(ForwardPass, LinkedPass(forward)), offset, controller)
    settled.response = cast(LinkedDeviation, settled.response).inner
    return settled


class LinkedDeviation(Deviation):
    """How the controlled network deviates, with Δg(r_L) for its output."""

    def __init__(self, inner: Deviation, at_rest: Tensor) -> None:
        self.inner, self.at_rest = inner, at_rest
        self.driven, self.basal = inner.driven, inner.basal

    @property
    def output(self) -> Tensor:
        return torch.softmax(self.at_rest + self.inner.output, dim=1) - torch.softmax(self.at_rest, dim=1)

    def where(self, keep: Tensor, other: LinkedDeviation | None = None) -> LinkedDeviation:
        return LinkedDeviation(self.inner.where(keep, None if other is None else other.inner), self.at_rest)


class LinkedPass:
    """A pass whose output is the softmax of its network's, as far as a solver of the steady state asks.

    All else is that of the network's own pass.

    Args:
        inner: that pass.
    """

    def __init__(self, inner: ForwardPass) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def samples(self, index: Tensor) -> LinkedPass:
        return LinkedPass(self.inner.samples(index))

    def respond(self, driven: list[Tensor]) -> LinkedDeviation:
        return LinkedDeviation(self.inner.respond(driven), self.inner.output)

    def linear_response(self, driven: list[Tensor]) -> Tensor:
        return (self._slope() @ self.inner.linear_response(driven).unsqueeze(2)).squeeze(2)

    def gain(self, at: LinkedDeviation | None = None) -> Tensor:
        """∂g/∂r_L JQ, (B, n_L, n_L)."""
        return self._slope(at) @ self.inner.gain(None if at is None else at.inner)

    def mean_gain(self) -> Tensor:
        return self._slope() @ self.inner.mean_gain()

    def _slope(self, at: LinkedDeviation | None = None) -> Tensor:
        """∂g/∂r_L of each sample, diag p − p pᵀ."""
        output = self.inner.output if at is None else self.inner.output + at.inner.output
        p = torch.softmax(output, dim=1)
        return torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
