"""Initial values of the feedback weights Q_i, (n_i, n_L)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from dfc_lightning.control.chain import Activity, Chain

FeedbackInit = Literal["weight_product", "xavier_normal", "orthogonal", "normal", "jacobian"]
FEEDBACK_INITS = ("weight_product", "xavier_normal", "orthogonal", "normal", "jacobian")


def initial_feedback(kind: FeedbackInit, weights: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Feedback weights for layers of the given forward weights; Q_L is the identity.

    Args:
        kind: ``"weight_product"``: Q_i = Π_{k>i} W_kᵀ, what the paper's fixed feedback is; ``"xavier_normal"``,
            ``"orthogonal"`` and ``"normal"`` (standard deviation 0.1) are random; ``"jacobian"`` starts as
            ``"weight_product"`` until activity has been seen, see :func:`averaged_pseudoinverse`.
        weights: W_i, (n_i, n_{i−1}).
        generator: source of the random kinds, on the CPU.
    """
    outputs = weights[-1].shape[0]
    last = torch.eye(outputs, dtype=weights[-1].dtype, device=weights[-1].device)
    if kind in ("weight_product", "jacobian"):
        found = [last]
        for w in reversed(weights[1:]):
            found.append(w.T @ found[-1])
        return found[::-1]
    return [*(random_feedback(kind, w.new_empty(w.shape[0], outputs), generator) for w in weights[:-1]), last]


def random_feedback(kind: FeedbackInit, like: Tensor, generator: torch.Generator) -> Tensor:
    """Random feedback weights of the shape, dtype and device of ``like``."""
    q = torch.empty(like.shape, dtype=like.dtype)
    if kind == "xavier_normal":
        nn.init.xavier_normal_(q, generator=generator)
    elif kind == "orthogonal":
        nn.init.orthogonal_(q, generator=generator)
    else:
        nn.init.normal_(q, std=0.1, generator=generator)
    return q.to(like.device)


def averaged_pseudoinverse(chain: Chain, activity: Activity, damping: float = 0.1) -> list[Tensor]:
    """The batch mean of J_iᵀ(JJᵀ + γI)⁻¹: an oracle, what Theorem 6 has the feedback weights learn.

    Args:
        chain: the controlled chain.
        activity: a feedforward pass.
        damping: γ > 0.
    """
    return pseudoinverse_mean(chain.jacobians(activity), damping)


def pseudoinverse_mean(jacobians: Sequence[Tensor], damping: float = 0.1) -> list[Tensor]:
    """The mean over samples of J_iᵀ(JJᵀ + γI)⁻¹ for Jacobians of each sample, (B, n_L, n_i)."""
    gram = sum((j @ j.mT for j in jacobians[1:]), start=jacobians[0] @ jacobians[0].mT)
    gram.diagonal(dim1=1, dim2=2).add_(damping)
    factor = torch.linalg.cholesky(gram)
    return [torch.cholesky_solve(j, factor).mean(0).T.contiguous() for j in jacobians]
