"""The expectation of feedback learning over its noise, in closed form: no draws, and none of their variance.

In the terms of :mod:`.loop`, a pulse in J_k n_k makes the control σ̃_k H_k with H_k = Z_k R, R = (I + Σ_i K_i G_i)⁻¹,
n_L × n_L at every lag. As all Z_k are further filters E_k of the last layer's, Z_k = E_k Z_L, one response H = Z_L R
serves all layers. It is that without the loop, z I with z the taps of Z_L, and a small smooth rest. A rest that is made
up of the functions K_i … K_j z lies, to rounding, in the span of few functions of time, V: H = z I + Σ_r V_r X_r, the
X_r n_L × n_L for each sample, found in a few turns of the loop,

    X ← −Σ_i (Vᵀ K_i z) G_i − Σ_i (Vᵀ K_i V) X G_i,

and sums over time become sums over r. :class:`Plan` holds their scalar weights, :class:`Expected` does the products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dfc_lightning.control.graph import Graph
from dfc_lightning.feedback_learning.layers import (
    AnyActivity,
    Layers,
    able_units,
    gated_product,
    jacobians_and_gains,
    outputs,
)
from dfc_lightning.feedback_learning.loop import Phase, filters, largest_gain, merged, step_through, turns
from dfc_lightning.feedback_learning.sampled import Noise, Sampled

EVERY_SAMPLE_UP_TO = 20
"""Widest output for which a feedback learning step takes every sample of the batch, to rounding."""

CLOSED_FORM_UP_TO = 256
"""Widest output for which n_L × n_L responses are formed."""


@dataclass(frozen=True)
class Expected(Sampled):
    """The mean over the noise of what :class:`Sampled` computes, to first order in the noise variance.

    With P_k = J_k J_kᵀ, over T steps, the gradient of Q_i is the batch mean of Q_i A + J_iᵀ C_i,

        A = Σ_k σ̃_k² Σ_j (T − j) (β S N S H_k)[j] P_k H_k[j]ᵀ,   C_i = σ̃_i² Σ_j (T − j) (S N)[j] H_i[j]ᵀ,

    j the lag; see :mod:`.expected`. Same arguments as :class:`Sampled`.

    The cost of a sample grows with the width of the output, about as its square. Beyond ``EVERY_SAMPLE_UP_TO`` outputs
    a learning step therefore takes fewer of the samples, every second, third and so on, so that it keeps its cost, and
    relative errors of 1e-4. That mean over part of a batch is unbiased, and closer to that over all of it than a
    sampled gradient is even where it is down to one sample. Beyond ``CLOSED_FORM_UP_TO`` outputs one sample costs more
    than to simulate all, and that is done. Outputs without noise of their own count as wide as the layer before them.
    """

    def draw(self, chain: Layers, activity: AnyActivity, noise: Noise) -> list[Tensor]:
        """The expected gradient for each Q_i, (n_i, n_L); ``noise`` is drawn from for the widest outputs only."""
        return self.gradient(chain, activity, noise)

    def gradient(self, chain: Layers, activity: AnyActivity, noise: Noise) -> list[Tensor]:
        """The expected gradient for each Q_i, (n_i, n_L); ``noise`` is drawn from for the widest outputs only."""
        return self._in_range(self._closed_form, chain, activity, noise)

    def every_nth_sample(self, chain: Layers | Graph) -> int:
        """As in :class:`FeedbackMethod`: 1 for up to ``EVERY_SAMPLE_UP_TO`` outputs."""
        width = chain.widths[-2] if self._reduces(chain) else outputs(chain)
        return math.ceil((width / EVERY_SAMPLE_UP_TO) ** 2) if width <= CLOSED_FORM_UP_TO else 1

    def _closed_form(self, chain: Layers, activity: AnyActivity, noise: Noise) -> list[Tensor]:
        if outputs(chain) > CLOSED_FORM_UP_TO:
            return self._drawn(chain, activity, noise)
        return self._mean(chain, activity)

    def _mean(self, chain: Layers, activity: AnyActivity) -> list[Tensor]:
        jacobians, gains = jacobians_and_gains(chain, activity)
        spreads = torch.stack([j @ j.mT for j in jacobians], dim=1)  # P_k
        batch, _, n, _ = gains.shape
        phase, accuracy = self.phase(chain.depth), 1e-14 if gains.dtype == torch.float64 else 1e-6
        if n > EVERY_SAMPLE_UP_TO:
            accuracy = 1e-4
        variances = tuple(sigma**2 for sigma in self._relative_sigmas(chain.depth))
        p = _plan(phase, variances, largest_gain(gains), accuracy, gains.dtype, gains.device)

        def combine(weights: Tensor, terms: Tensor) -> Tensor:
            """Σ_r weights_sr terms_r of each sample, (B, S, n, n)."""
            return (weights @ terms.flatten(2)).view(batch, -1, n, n)

        if p.turns is None:
            alone = p.alone[:, None, None, None] * torch.eye(n, dtype=gains.dtype, device=gains.device)
            rest = (step_through(phase, gains, alone.expand(-1, batch, -1, -1)) - alone).transpose(0, 1).contiguous()
        else:
            rest = first = combine(p.first, gains).view(batch, -1, n)
            for turn, weights in p.turns:
                turned = combine(turn, rest.view(batch, -1, n, n)).view(batch, len(weights), -1, n).unbind(1)
                rest = first
                for each, gain in zip(turned, combine(weights, gains).unbind(1)):
                    rest = torch.baddbmm(rest, each, gain)
            rest = rest.view(batch, -1, n, n)

        rows = "b" if self.gated else ""  # where A of each sample is needed, and not their sum
        both = torch.einsum(f"k,bkij->{rows}ij", p.constant, spreads)
        both += torch.einsum(f"bkij,bkjl->{rows}il", combine(p.left, rest), spreads)
        both += torch.einsum(f"bkij,bkjl->{rows}li", combine(p.right, rest), spreads)
        halves = combine(p.square_left, rest) @ combine(p.square, spreads)
        both += torch.einsum(f"bmij,bmlj->{rows}il", halves, combine(p.square_right, rest))
        crosses = combine(p.cross, rest)
        crosses.diagonal(dim1=2, dim2=3).add_(p.cross_constant[:, None])
        scale = self._scale(activity) * (self.sigma * self.dt**0.5 / self.apical_tau) ** 2
        if self.gated:
            able = able_units(chain, activity)
            held = [gated_product(q, both, m) for q, m in zip(chain.feedback, able)]
        else:
            held = [q @ both for q in chain.feedback]
        return [
            scale * (first + (cross.transpose(0, 1).reshape(n, -1) @ jacobian.flatten(0, 1)).T)
            for first, jacobian, cross in zip(held, jacobians, crosses.unbind(1))
        ]


@dataclass(frozen=True)
class Plan:
    """The scalar weights of the sums that make up A and C_i, for R functions of time and L layers."""

    turns: list[tuple[Tensor, Tensor]] | None
    """Of each turn, −Vᵀ K'_q V of merged filters K', (Q R, R), and the weights of the gains that go with them, (Q, L).

    None where X is had by stepping through time, with a unit pulse at each lag for V.
    """
    alone: Tensor
    """z, (T,)."""
    first: Tensor
    """−Vᵀ K_i z, (R, L)."""
    constant: Tensor
    """Of P_k in A, (L,)."""
    left: Tensor
    """Of X_r P_k, (L, R)."""
    right: Tensor
    """Of P_k X_rᵀ, (L, R)."""
    square_left: Tensor
    """With the next two, of the products Σ_l (Σ_r … X_r) (Σ_k … P_k) (Σ_s … X_s)ᵀ, (M, R)."""
    square: Tensor
    """(M, L)."""
    square_right: Tensor
    """(M, R)."""
    cross_constant: Tensor
    """Of I in C_i, (L,)."""
    cross: Tensor
    """Of X_rᵀ in C_i, (L, R)."""


@lru_cache(maxsize=64)
def _plan(
    phase: Phase,
    variances: tuple[float, ...],
    gain: float,
    accuracy: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Plan:
    """The weights for gains of at most ``gain``."""
    found, steps = filters(phase), phase.steps
    alone = found.to_control[-1][:, 0]
    loop = torch.stack(found.loop)
    count = turns(phase, gain, accuracy)
    tolerance = accuracy * float(alone.norm())
    stages: list[tuple[Tensor, Tensor]] | None = None
    if count is None:
        basis, sizes = torch.eye(steps, dtype=torch.float64), alone.new_ones(steps)
    else:
        basis, sizes = _span(loop * gain, alone, count, tolerance)
        projected = basis.T @ loop @ basis
        shrinks = gain * float(torch.linalg.matrix_norm(projected[-1], 2))
        stages = []
        for later in reversed(range(count - 1)):  # an error of this turn shrinks in the later ones
            kernels, weights = merged(projected * sizes * gain, tolerance / min(1.0, shrinks) ** later)
            stages.append((-(kernels / (sizes * gain)).flatten(0, 1).to(device, dtype), weights.to(device, dtype)))
    counts = (steps - torch.arange(steps, dtype=torch.float64)).unsqueeze(1)
    # E_k z and E_k V side by side: the functions of time that H_k is made of.
    own = torch.stack(found.further) @ torch.cat([alone.unsqueeze(1), basis], dim=1)
    variance = torch.tensor(variances, dtype=torch.float64)
    pairs = variance[:, None, None] * ((found.heard @ own).mT @ (counts * own))
    crosses = variance[:, None] * (found.held[:, 0] @ (counts * own))
    squares = pairs[:, 1:, 1:] * sizes[:, None] * sizes
    bound = accuracy * float(squares.abs().max() if count is None else pairs[:, 0, 0].abs().max())
    lefts, middles, rights = _factors(squares, bound)
    rows = (
        alone,
        -(basis.T @ (loop @ alone).T),
        pairs[:, 0, 0],
        pairs[:, 1:, 0],
        pairs[:, 0, 1:],
        lefts / sizes,
        middles,
        rights / sizes,
        crosses[:, 0],
        crosses[:, 1:],
    )
    return Plan(stages, *(row.to(device, dtype).contiguous() for row in rows))


def _span(turn: Tensor, start: Tensor, count: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of K_i … K_j z for up to ``count`` filters, (T, R), and the size of each coordinate."""
    words, found = start.unsqueeze(1), [start.new_zeros(len(start), 1)]
    for _ in range(count):
        words = torch.cat(list(turn @ words), dim=1)
        u, s, _ = torch.linalg.svd(words, full_matrices=False)
        words = (u * s)[:, s > 0.1 * tolerance]
        found.append(words)
    u, s, _ = torch.linalg.svd(torch.cat(found, dim=1), full_matrices=False)
    rank = max(1, int((s > tolerance).sum()))
    return u[:, :rank], s[:rank].clamp_min(1e-300)


def _factors(squares: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_k squares_k ⊗ P_k, (L, R, R), as few products of three sums: their weights, (M, R), (M, L) and (M, R)."""
    slices, weights = merged(squares, tolerance)
    lefts, middles, rights = [], [], []
    for each, weight in zip(slices, weights):
        u, s, vh = torch.linalg.svd(each)
        rank = int((s > tolerance).sum())
        lefts.append((u[:, :rank] * s[:rank]).T)
        middles.append(weight.expand(rank, -1))
        rights.append(vh[:rank])
    return torch.cat(lefts), torch.cat(middles), torch.cat(rights)
