"""Closed forms of a chain, of its weights W_i, feedback weights Q_i and slopes D_i.

With K_1 = Q_1, K_i = Q_i + W_i D_{i−1} K_{i−1}: JQ = D_L K_L, and J_L = D_L, J_i = J_{i+1} W_{i+1} D_i.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def columns(weights: Sequence[Tensor], feedback: Sequence[Tensor], slopes: Sequence[Tensor], layers: int) -> Tensor:
    """K of layer number ``layers``, transposed, (B, n_L, n): K_1 = Q_1, K_i = Q_i + W_i D_{i−1} K_{i−1}.

    The n_L columns of K ride through each layer as rows of the batch.
    """
    found = feedback[0].T.expand(slopes[0].shape[0], -1, -1)
    for w, q, d in zip(weights[1:layers], feedback[1:], slopes):
        found = torch.matmul(found * d.unsqueeze(1), w.T).add_(q.T)
    return found


def output_gain(weights: Sequence[Tensor], feedback: Sequence[Tensor], slopes: Sequence[Tensor]) -> Tensor:
    """JQ = D_L K_L, (B, n_L, n_L)."""
    return (columns(weights, feedback, slopes, len(weights)) * slopes[-1].unsqueeze(1)).transpose(1, 2)


def hidden_gain(weights: Sequence[Tensor], feedback: Sequence[Tensor], slopes: Sequence[Tensor]) -> Tensor:
    """N = D_{L−1} K_{L−1}, (B, n_{L−1}, n_L): what a unit of control makes of the rates before the output layer."""
    return (columns(weights, feedback, slopes, len(weights) - 1) * slopes[-2].unsqueeze(1)).transpose(1, 2)


def jacobians(weights: Sequence[Tensor], slopes: Sequence[Tensor]) -> list[Tensor]:
    """J_i, one (B, n_L, n_i) a layer: J_L = D_L, J_i = J_{i+1} W_{i+1} D_i."""
    product = torch.diag_embed(slopes[-1])
    found = [product]
    for w, d in zip(reversed(weights[1:]), reversed(slopes[:-1])):
        product = torch.matmul(product, w).mul_(d.unsqueeze(1))
        found.append(product)
    return found[::-1]
