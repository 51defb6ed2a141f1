"""Solving with JQ + α̃ I: exactly for each sample, or with one matrix for the whole batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dfc_lightning.control.chain import Activity, Chain

EXACT_UP_TO = 64
"""Widest output for which each sample's own n_L × n_L matrix is factorised.

Beyond it the factors outweigh the network, and batched LU of matrices wider than 128 has been seen to return
wrong results on multi-threaded CPUs."""


def control_inverse(chain: Chain, activity: Activity, leakage: float) -> tuple[Callable[[Tensor], Tensor], bool]:
    """A function y ↦ (JQ + α̃ I)⁻¹ y for y of shape (B, n_L), and whether it is exact.

    Up to ``EXACT_UP_TO`` outputs it is each sample's own inverse at the feedforward state. For wider outputs it is
    the mean-field one: the K recursion with batch-mean slopes, one matrix for all samples. A singular matrix is
    answered with infinities, not an exception.
    """
    exact = chain.widths[-1] <= EXACT_UP_TO
    slopes = activity.slopes if exact else [d.mean(0, keepdim=True) for d in activity.slopes]
    gain = chain.output_gain(slopes)
    gain.diagonal(dim1=1, dim2=2).add_(leakage)
    factors, pivots, _ = torch.linalg.lu_factor_ex(gain)

    def solve(y: Tensor) -> Tensor:
        if exact:
            return torch.linalg.lu_solve(factors, pivots, y.unsqueeze(2)).squeeze(2)
        return torch.linalg.lu_solve(factors[0], pivots[0], y.T).T

    return solve, exact
