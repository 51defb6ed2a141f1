"""JJᵀ + γ I of Jacobians to many voltages: what least changes of these that move the output are solved with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gram_factor(
    jacobians: Sequence[Tensor], damping: float | Tensor, weights: Sequence[Tensor] | None = None
) -> Tensor:
    """The Cholesky factor of Σ_i w_i J_i J_iᵀ + γ I of each sample, (B, n_L, n_L).

    Where that is singular, the factor is not finite or holds a part of the matrix only: nothing is raised, and the
    host does not wait for a GPU.

    Args:
        jacobians: J_i, (B, n_L, n_i).
        damping: γ ≥ 0, or those of the samples, (B, 1).
        weights: w_i ≥ 0 of each sample, (B,), one a Jacobian; None for ones.
    """
    gram: Tensor | None = None
    for i, j in enumerate(jacobians):
        part = j @ j.mT if weights is None else (j @ j.mT) * weights[i].view(-1, 1, 1)
        gram = part if gram is None else gram.add_(part)
    assert gram is not None
    gram.diagonal(dim1=1, dim2=2).add_(damping)
    return torch.linalg.cholesky_ex(gram)[0]
