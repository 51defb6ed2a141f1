"""The expectation of feedback learning over its noise, in closed form: no draws, and none of their variance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dfc_lightning.feedback_learning.layers import LayerGroups, gated_product, side_by_side
from dfc_lightning.feedback_learning.method import Noise
from dfc_lightning.feedback_learning.phase import largest_gain
from dfc_lightning.feedback_learning.plan import Plan, plan
from dfc_lightning.feedback_learning.sampled import Sampled
from dfc_lightning.passes.forward_pass import ForwardPass

EVERY_SAMPLE_UP_TO = 20
"""Widest output for which a feedback learning step takes every sample of the batch, to rounding."""

CLOSED_FORM_UP_TO = 256
"""Widest output for which n_L × n_L responses are formed."""


@dataclass(frozen=True)
class Expected(Sampled):
    """The mean over the noise of what :class:`Sampled` computes, to first order in the noise variance.

    With P_k = J_k J_kᵀ, over T steps, the gradient of Q_i is the batch mean of Q_i A + J_iᵀ C_i,

        A = Σ_k σ̃_k² Σ_j (T − j) (β S N S H_k)[j] P_k H_k[j]ᵀ,   C_i = σ̃_i² Σ_j (T − j) (S N)[j] H_i[j]ᵀ,

    j the lag; see :mod:`.plan`. Same arguments as :class:`Sampled`.

    The cost of a sample grows with the width of the output, about as its square. Beyond ``EVERY_SAMPLE_UP_TO`` outputs
    a learning step therefore takes fewer of the samples, every second, third and so on, so that it keeps its cost, and
    relative errors of 1e-4. That mean over part of a batch is unbiased, and closer to that over all of it than a
    sampled gradient is even where it is down to one sample. Beyond ``CLOSED_FORM_UP_TO`` outputs one sample costs more
    than to simulate all, and that is done. Outputs without noise of their own count as wide as the layer before them.
    """

    def draw(self, forward: ForwardPass, noise: Noise) -> list[Tensor]:
        """The expected gradient for each Q_i, (n_i, n_L); ``noise`` is drawn from for the widest outputs only."""
        return self.gradient(forward, noise)

    def gradient(self, forward: ForwardPass, noise: Noise) -> list[Tensor]:
        """The expected gradient for each Q_i, (n_i, n_L); ``noise`` is drawn from for the widest outputs only."""
        return self._in_range(self._closed_form, forward, noise)

    def every_nth_sample(self, forward: ForwardPass) -> int:
        """As in :class:`FeedbackMethod`: 1 for up to ``EVERY_SAMPLE_UP_TO`` outputs."""
        chain = self._reducible(forward)
        width = forward.outputs if chain is None else chain.widths[-2]
        return math.ceil((width / EVERY_SAMPLE_UP_TO) ** 2) if width <= CLOSED_FORM_UP_TO else 1

    def _closed_form(self, forward: ForwardPass, noise: Noise) -> list[Tensor]:
        if forward.outputs > CLOSED_FORM_UP_TO:
            return self._drawn(forward, noise)
        return self._mean(forward)

    def _mean(self, forward: ForwardPass) -> list[Tensor]:
        layers = LayerGroups(forward)
        jacobians, gains = layers.jacobians_and_gains()
        planned = self._plan(layers.depth, gains)
        spreads = torch.stack([j @ j.mT for j in jacobians], dim=1)  # P_k
        rest = planned.rest(gains)
        squares = planned.squares(rest, spreads, each=self.gated)
        if self.gated:
            held = [gated_product(q, squares, m) for q, m in zip(layers.feedback, layers.able)]
        else:
            held = [q @ squares for q in layers.feedback]
        scale = self._scale(forward) * self._kick**2
        crosses = planned.crosses(rest).unbind(1)
        return layers.by_point(
            [
                scale * (first + (side_by_side(cross) @ jacobian.flatten(0, 1)).T)
                for first, jacobian, cross in zip(held, jacobians, crosses)
            ]
        )

    def _plan(self, depth: int, gains: Tensor) -> Plan:
        """The weights of the sums for gains G_i, (B, L, n_L, n_L)."""
        accuracy = 1e-14 if gains.dtype == torch.float64 else 1e-6
        if gains.shape[2] > EVERY_SAMPLE_UP_TO:
            accuracy = 1e-4
        variances = tuple(sigma**2 for sigma in self._relative_sigmas(depth))
        return plan(self.phase(depth), variances, largest_gain(gains), accuracy, gains.dtype, gains.device)
