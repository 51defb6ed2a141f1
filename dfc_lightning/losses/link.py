"""The output's own nonlinearity g: that of a loss whose gradient is ∂ℓ/∂r_L = c (g(r_L) − y) for a label y."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Link = Literal["identity", "softmax", "sigmoid"]
LINKS: tuple[Link, ...] = ("identity", "softmax", "sigmoid")
"""Those of squared errors, of cross entropy, and of binary cross entropy, the two latter of logits."""

NEAR = 1.0
"""The largest deviation of an output for which exponentials are expanded about 1."""


def linked(link: Link, output: Tensor) -> Tensor:
    """g(r_L), (B, n_L)."""
    if link == "softmax":
        return torch.softmax(output, dim=1)
    return torch.sigmoid(output) if link == "sigmoid" else output


def change(link: Link, output: Tensor, deviation: Tensor) -> Tensor:
    """g(r_L + δ) − g(r_L), with all its digits for a small δ, (B, n_L)."""
    if link == "identity":
        return deviation
    if link == "sigmoid":  # tanh(a + b) − tanh(a) = tanh(b) (1 − tanh²(a)) / (1 + tanh(a) tanh(b))
        step, slope, t = torch.tanh(deviation / 2), _logistic_slope(output), torch.tanh(output / 2)
        near = 2 * step * slope / (1 + t * step)
    else:
        p, grown = torch.softmax(output, dim=1), torch.expm1(deviation.clamp(-NEAR, NEAR))
        mean = (p * grown).sum(1, keepdim=True)
        near = p * (grown - mean) / (1 + mean)
    far = linked(link, output + deviation) - linked(link, output)
    return torch.where(deviation.abs().amax(1, keepdim=True) <= NEAR, near, far)


def slope(link: Link, output: Tensor) -> Tensor:
    """∂g/∂r_L of each sample, (B, n_L, n_L): I, diag p − p pᵀ, or diag p (1 − p)."""
    if link == "softmax":
        p = torch.softmax(output, dim=1)
        return torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    return torch.diag_embed(_logistic_slope(output) if link == "sigmoid" else torch.ones_like(output))


def tangent(link: Link, output: Tensor, deviation: Tensor) -> Tensor:
    """∂g/∂r_L of each sample times a small deviation, (B, n_L): :func:`change` to first order."""
    if link == "softmax":
        p = torch.softmax(output, dim=1)
        return p * (deviation - (p * deviation).sum(1, keepdim=True))
    return deviation * _logistic_slope(output) if link == "sigmoid" else deviation


def _logistic_slope(output: Tensor) -> Tensor:
    return torch.sigmoid(output) * torch.sigmoid(-output)
