"""Sums over time of products of two smooth time series, with fewer multiplications than time steps.

A sum over K steps is the same in any orthonormal basis of time, Σ_t a[t]ᵀ b[t] = Σ_k A_kᵀ B_k with
A_k = Σ_t P_k(t) a[t] and B_k likewise. In a basis of polynomials of rising degree the terms of slow dynamics fall off
fast, and what all terms from the p-th on amount to is at most (Σ_{k≥p} ‖A_k‖²)^½ (Σ_{k≥p} ‖B_k‖²)^½. Terms are left
out where that is below rounding, measured against the same bound on the whole sum; noise, kinks and blow-ups simply
need all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 8
"""Steps that are held, and summed together."""

NARROW = 4
"""A change of basis pays for n × m products with n m / (n + m) beyond this many blocks' steps."""


class ProductSums:
    """Σ_t a[t]ᵀ b[t] of pairs of time series, to rounding.

    Holds the last ``BLOCK`` values of each, unless it is narrow. Looks at data on the host once a block.

    Args:
        lefts: what a[t] of each pair is like, (B, n).
        rights: what b[t] of each pair is like, (B, m).
    """

    def __init__(self, lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> None:
        pairs = [(a.shape[1], b.shape[1]) for a, b in zip(lefts, rights)]
        self._totals = [a.new_zeros(pair) for a, pair in zip(lefts, pairs)]
        self._wide = [k for k, (n, m) in enumerate(pairs) if n * m > NARROW * BLOCK * (n + m)]
        self._narrow = [k for k in range(len(pairs)) if k not in self._wide]
        self._held = [[x[k].new_empty(BLOCK, *x[k].shape) for x in (lefts, rights)] for k in self._wide]
        self._count = 0
        if self._wide:
            self._spare = lefts[0].new_empty(max(block.numel() for pair in self._held for block in pair))
            self._basis = polynomials(BLOCK).to(self._spare)

    def add(self, lefts: Sequence[Tensor], rights: Sequence[Tensor], times: int = 1) -> None:
        """Count a step in, or ``times`` equal ones."""
        for k in range(len(self._totals)) if times != 1 else self._narrow:
            self._totals[k].addmm_(lefts[k].T, rights[k], alpha=times)
        if times != 1 or not self._wide:
            return
        for k, (left, right) in zip(self._wide, self._held):
            left[self._count].copy_(lefts[k])
            right[self._count].copy_(rights[k])
        self._count += 1
        if self._count == BLOCK:
            self._multiply(self._terms_needed())

    def totals(self) -> list[Tensor]:
        """The sums so far, (n, m) a pair."""
        self._multiply([self._count] * len(self._wide))
        return self._totals

    def _terms_needed(self) -> list[int]:
        """Replace what is held by its terms in the other basis, and tell how many of them count."""
        tails = []
        for block in (block for pair in self._held for block in pair):
            terms = torch.mm(self._basis, block.flatten(1), out=self._spare[: block.numel()].view(BLOCK, -1))
            block.copy_(terms.view_as(block))
            tails.append(torch.linalg.vector_norm(terms, dim=1).square().flip(0).cumsum(0).sqrt().flip(0))
        bound = torch.stack(tails[::2]) * torch.stack(tails[1::2])
        negligible = bound < torch.finfo(bound.dtype).eps * bound[:, :1]  # false of infinities and NaN
        return (~negligible).sum(1).tolist()

    def _multiply(self, counts: Sequence[int]) -> None:
        """Add the first so many products that are held to the sums, and hold none."""
        for k, (left, right), count in zip(self._wide, self._held, counts):
            self._totals[k].addmm_(left[:count].flatten(0, 1).T, right[:count].flatten(0, 1))
        self._count = 0


def polynomials(count: int) -> Tensor:
    """An orthonormal basis of ``count`` time steps, (count, count): in each row a polynomial, of rising degree."""
    powers = torch.linspace(-1, 1, count, dtype=torch.float64).unsqueeze(1) ** torch.arange(count)
    return torch.linalg.qr(powers).Q.T
