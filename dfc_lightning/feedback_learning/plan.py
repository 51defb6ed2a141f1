"""The sums over time that make up the expected gradient, as sums over few functions of time.

In the terms of :mod:`.phase`, a pulse in J_k n_k makes the control σ̃_k H_k with H_k = Z_k R, R = (I + Σ_i K_i G_i)⁻¹,
n_L × n_L at every lag. As all Z_k are further filters E_k of the last layer's, Z_k = E_k Z_L, one response H = Z_L R
serves all layers. It is that without the loop, z I with z the taps of Z_L, and a small smooth rest. A rest that is made
up of the functions K_i … K_j z lies, to rounding, in the span of few functions of time, V: H = z I + Σ_r V_r X_r, the
X_r n_L × n_L for each sample, found in a few turns of the loop,

    X ← −Σ_i (Vᵀ K_i z) G_i − Σ_i (Vᵀ K_i V) X G_i,

and sums over time become sums over r. :func:`plan` finds their scalar weights, :class:`Plan` does the products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dfc_lightning.feedback_learning.phase import Filters, Phase, filters, merged, step_through, turns


@dataclass(frozen=True)
class Plan:
    """The scalar weights of the sums that make up A and C_i, for R functions of time and L layers."""

    phase: Phase
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

    def rest(self, gains: Tensor) -> Tensor:
        """X, (B, R, n_L, n_L), for gains G_i, (B, L, n_L, n_L)."""
        return self._stepped(gains) if self.turns is None else self._turned(gains, self.turns)

    def _stepped(self, gains: Tensor) -> Tensor:
        batch, _, n, _ = gains.shape
        alone = self.alone[:, None, None, None] * torch.eye(n, dtype=gains.dtype, device=gains.device)
        found = step_through(self.phase, gains, alone.expand(-1, batch, -1, -1)) - alone
        return found.transpose(0, 1).contiguous()

    def _turned(self, gains: Tensor, stages: list[tuple[Tensor, Tensor]]) -> Tensor:
        batch, _, n, _ = gains.shape
        found = first = _combined(self.first, gains).view(batch, -1, n)
        for turn, weights in stages:
            turned = _combined(turn, found.view(batch, -1, n, n)).view(batch, len(weights), -1, n).unbind(1)
            found = first
            for each, gain in zip(turned, _combined(weights, gains).unbind(1)):
                found = torch.baddbmm(found, each, gain)
        return found.view(batch, -1, n, n)

    def squares(self, rest: Tensor, spreads: Tensor, each: bool) -> Tensor:
        """Σ_b A, (n_L, n_L), or A of ``each`` sample, (B, n_L, n_L).

        Args:
            rest: X, (B, R, n_L, n_L).
            spreads: P_k, (B, L, n_L, n_L).
            each: see above.
        """
        rows = "b" if each else ""
        found = torch.einsum(f"k,bkij->{rows}ij", self.constant, spreads)
        found += torch.einsum(f"bkij,bkjl->{rows}il", _combined(self.left, rest), spreads)
        found += torch.einsum(f"bkij,bkjl->{rows}li", _combined(self.right, rest), spreads)
        halves = _combined(self.square_left, rest) @ _combined(self.square, spreads)
        found += torch.einsum(f"bmij,bmlj->{rows}il", halves, _combined(self.square_right, rest))
        return found

    def crosses(self, rest: Tensor) -> Tensor:
        """C_iᵀ, (B, L, n_L, n_L), for X, (B, R, n_L, n_L)."""
        found = _combined(self.cross, rest)
        found.diagonal(dim1=2, dim2=3).add_(self.cross_constant[:, None])
        return found


def _combined(weights: Tensor, terms: Tensor) -> Tensor:
    """Σ_r weights_sr terms_r of each sample, (B, S, n, n)."""
    batch, _, n, _ = terms.shape
    return (weights @ terms.flatten(2)).view(batch, -1, n, n)


@lru_cache(maxsize=64)
def plan(
    phase: Phase,
    variances: tuple[float, ...],
    gain: float,
    accuracy: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Plan:
    """The weights for noise of ``variances`` σ̃_i² in the layers and gains of at most ``gain``."""
    found, count = filters(phase), turns(phase, gain, accuracy)
    alone, loop = found.to_control[-1][:, 0], torch.stack(found.loop)
    tolerance = accuracy * float(alone.norm())
    stages: list[tuple[Tensor, Tensor]] | None = None
    if count is None:
        span = Span(torch.eye(phase.steps, dtype=torch.float64), alone.new_ones(phase.steps))
    else:
        span = _span(loop * gain, alone, count, tolerance)
        stages = [
            (turn.to(device, dtype), w.to(device, dtype)) for turn, w in _stages(loop, span, gain, count, tolerance)
        ]
    pairs, crosses = _moments(found, alone, span, variances)
    squares = pairs[:, 1:, 1:] * span.sizes[:, None] * span.sizes
    largest = squares if count is None else pairs[:, 0, 0]
    lefts, middles, rights = _factors(squares, accuracy * float(largest.abs().max()))
    rows = (
        alone,
        -(span.functions.T @ (loop @ alone).T),
        pairs[:, 0, 0],
        pairs[:, 1:, 0],
        pairs[:, 0, 1:],
        lefts / span.sizes,
        middles,
        rights / span.sizes,
        crosses[:, 0],
        crosses[:, 1:],
    )
    return Plan(phase, stages, *(row.to(device, dtype).contiguous() for row in rows))


class Span(NamedTuple):
    """The functions of time that the rest of a response is made of."""

    functions: Tensor
    """V, orthonormal, (T, R)."""
    sizes: Tensor
    """How large a response is along each, (R,)."""


def _span(turn: Tensor, start: Tensor, count: int, tolerance: float) -> Span:
    """That of K_i … K_j z for up to ``count`` filters K, given as ``turn``, and z, given as ``start``."""
    words, found = start.unsqueeze(1), [start.new_zeros(len(start), 1)]
    for _ in range(count):
        words = torch.cat(list(turn @ words), dim=1)
        u, s, _ = torch.linalg.svd(words, full_matrices=False)
        words = (u * s)[:, s > 0.1 * tolerance]
        found.append(words)
    u, s, _ = torch.linalg.svd(torch.cat(found, dim=1), full_matrices=False)
    rank = max(1, int((s > tolerance).sum()))
    return Span(u[:, :rank], s[:rank].clamp_min(1e-300))


def _stages(loop: Tensor, span: Span, gain: float, count: int, tolerance: float) -> list[tuple[Tensor, Tensor]]:
    """What :attr:`Plan.turns` holds, for filters K_i, ``loop``, (L, T, T)."""
    projected = span.functions.T @ loop @ span.functions
    shrinks, found = gain * float(torch.linalg.matrix_norm(projected[-1], 2)), []
    for later in reversed(range(count - 1)):  # an error of this turn shrinks in the later ones
        kernels, weights = merged(projected * span.sizes * gain, tolerance / min(1.0, shrinks) ** later)
        found.append((-(kernels / (span.sizes * gain)).flatten(0, 1), weights))
    return found


def _moments(found: Filters, alone: Tensor, span: Span, variances: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Weights of E_k z and E_k V, side by side, in A, (L, 1 + R, 1 + R), and in C_k, (L, 1 + R)."""
    steps = len(alone)
    counts = (steps - torch.arange(steps, dtype=torch.float64)).unsqueeze(1)
    own = torch.stack(found.further) @ torch.cat([alone.unsqueeze(1), span.functions], dim=1)  # what H_k is made of
    variance = torch.tensor(variances, dtype=torch.float64)
    pairs = variance[:, None, None] * ((found.heard @ own).mT @ (counts * own))
    return pairs, variance[:, None] * (found.held[:, 0] @ (counts * own))


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
