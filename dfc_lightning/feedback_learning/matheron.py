"""One draw of feedback learning with the law of its simulation, without simulating the units.

To first order in the noise, the control depends on the noise n_k[t] of a layer only through its n_L numbers
J_k n_k[t] (see :mod:`.phase`). With the control u, (n_L, T), known, the update of a sample is

    −ΔQ_k ∝ Q_k Σ_t (S w)[t] u[t]ᵀ + σ̃_k N_k ũᵀ,   ũ = u S N,

N_k the (n_k, T) draws. The first term needs no units. Of the second, the part of N_k in the row space of J_k is known
already, and the rest is independent of u: given u, N_k ũᵀ is Gaussian, with independent rows of covariance ũ ũᵀ. So
it is drawn as Z Sᵀ, with S Sᵀ = ũ ũᵀ and only n_L draws a unit, and moved to where it agrees with what is known of it
(Matheron's rule): with J_k J_kᵀ = R Rᵀ and J_k N_k = R E, E standard normal,

    N_k ũᵀ = Z Sᵀ + J_kᵀ (R Rᵀ)⁻¹ (R E ũᵀ − J_k Z Sᵀ).

It is a draw of the same distribution, at a tenth of the cost. A layer of few units has its N_k drawn as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dfc_lightning.feedback_learning.layers import LayerGroups, gated_product, side_by_side
from dfc_lightning.feedback_learning.method import Noise
from dfc_lightning.feedback_learning.phase import Phase, filters, largest_gain, merged, step_through, turns


class Draws(NamedTuple):
    """What is drawn of the noise of a layer that has some, before the control is known."""

    sigma: float
    """σ̃_k."""
    inner: Tensor
    """N_k, or E where that is fewer, (B, n, T)."""
    root: Tensor
    """What takes them to the output, J_k or R, (B, n_L, n)."""
    jacobian: Tensor
    """J_k, (B, n_L, n_k)."""
    latent: bool
    """Whether E is drawn."""


def drawn(
    layers: LayerGroups, phase: Phase, sigmas: Sequence[float], noise: Noise, gated: bool = False
) -> list[Tensor]:
    """Σ_b Σ_t v_i^fb uᵀ, transposed, (n_L, n_i), for each group of points.

    Args:
        layers: the groups, layers of a chain.
        phase: the phase.
        sigmas: standard deviation σ̃_i of the noise in layer i.
        noise: source of standard normal draws of the shapes it asks for.
        gated: of the units alone whose rates can move.
    """
    jacobians, gains = layers.jacobians_and_gains()
    like = layers.forward.output
    held, heard, *to_control = _filters(phase, like.dtype, like.device)
    draws = [_drawn(jacobian, sigma, phase.steps, noise) for jacobian, sigma in zip(jacobians, sigmas)]
    u = _controlled(phase, gains, _alone(draws, to_control, like))
    answer = u @ (u @ heard).mT  # Σ u (S w)ᵀ
    met = u @ held
    spread = _root(met @ met.mT)
    totals = []
    for k, (q, layer) in enumerate(zip(layers.feedback, draws)):
        able = layers.able[k] if gated else None
        total = answer.sum(0) @ q.T if able is None else gated_product(q, answer.mT, able).T.contiguous()
        if layer is not None:
            total += layer.sigma * _met(layer, met, spread, noise, able)
        totals.append(total)
    return totals


def _drawn(jacobian: Tensor, sigma: float, steps: int, noise: Noise) -> Draws | None:
    """A layer's draws; none without noise."""
    if sigma == 0:
        return None
    batch, n, width = jacobian.shape
    latent = width > n < steps
    root = _root(jacobian @ jacobian.mT) if latent else jacobian
    inner = noise((batch, root.shape[2] * steps)).view(batch, root.shape[2], steps)
    return Draws(sigma, inner, root, jacobian, latent)


def _alone(draws: Sequence[Draws | None], to_control: Sequence[Tensor], like: Tensor) -> Tensor:
    """What the noise makes of the control before its loop is closed, (B, n_L, T), for outputs ``like`` (B, n_L)."""
    (batch, n), steps = like.shape, len(to_control[0])
    alone = like.new_zeros(batch * n, steps)
    for layer, z in zip(draws, to_control):
        if layer is not None:
            alone.addmm_((layer.root @ layer.inner).view(batch * n, steps), z, alpha=layer.sigma)
    return alone.view(batch, n, steps)


def _met(layer: Draws, met: Tensor, spread: Tensor, noise: Noise, able: Tensor | None) -> Tensor:
    """Σ_b ũ N_kᵀ, (n_L, n_k), the control being known.

    Args:
        layer: what has been drawn of N_k.
        met: ũ, (B, n_L, T).
        spread: S with S Sᵀ = ũ ũᵀ, (B, n_L, n_L).
        noise: source of standard normal draws.
        able: 1 for the units that count, (B, n_k); None for all.
    """
    own = met @ layer.inner.mT
    if not layer.latent:
        return (own if able is None else own * able.unsqueeze(1)).sum(0)
    batch, n, width = layer.jacobian.shape
    z = noise((batch, n * width)).view(batch, n, width)
    own = own - spread @ torch.linalg.solve_triangular(layer.root, layer.jacobian @ z.mT, upper=False).mT
    own = torch.linalg.solve_triangular(layer.root, own, upper=False, left=False)
    z = z if able is None else z * able.unsqueeze(1)
    return side_by_side(spread) @ z.flatten(0, 1) + side_by_side(own) @ layer.jacobian.flatten(0, 1)


def _controlled(phase: Phase, gains: Tensor, alone: Tensor) -> Tensor:
    """The control with its loop closed, (B, n_L, T), from that without."""
    accuracy = 1e-14 if alone.dtype == torch.float64 else 1e-6
    gain = largest_gain(gains)
    count = turns(phase, gain, accuracy)
    if count is None:
        return step_through(phase, gains, alone.permute(2, 0, 1).unsqueeze(3)).squeeze(3).permute(1, 2, 0).contiguous()
    kernels, weights = _loop(phase, gain, accuracy, alone.dtype, alone.device)
    mixed = -(weights @ gains.flatten(2)).view(len(gains), -1, *gains.shape[2:])
    u = alone
    for _ in range(count):
        turned = (u @ kernels).split(phase.steps, dim=2)
        u = alone
        for gain_of, each in zip(mixed.unbind(1), turned):
            u = torch.baddbmm(u, gain_of, each)
    return u


def _root(covariance: Tensor) -> Tensor:
    """R with R Rᵀ = ``covariance`` to rounding, lower triangular and invertible.

    The tiny ridge stands for noise of that size in the outputs: where units are dead the covariance is singular.
    """
    n, limits = covariance.shape[-1], torch.finfo(covariance.dtype)
    ridge = n * limits.eps * covariance.diagonal(dim1=1, dim2=2).sum(1) + limits.tiny
    eye = torch.eye(n, dtype=covariance.dtype, device=covariance.device)
    return torch.linalg.cholesky_ex(covariance + ridge[:, None, None] * eye)[0]


@lru_cache(maxsize=16)
def _filters(phase: Phase, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """``held`` for u on its left and the transposes of ``heard`` and ``to_control``, for time in the last dimension."""
    found = filters(phase)
    return [f.to(device, dtype).contiguous() for f in (found.held, found.heard.T, *(z.T for z in found.to_control))]


@lru_cache(maxsize=64)
def _loop(
    phase: Phase, gain: float, accuracy: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Few filters that make up K_1 … K_L, transposed and side by side, (T, Q T), and the weights, (Q, L)."""
    kernels, weights = merged(torch.stack([k.T for k in filters(phase).loop]), accuracy / gain)
    return kernels.transpose(0, 1).reshape(phase.steps, -1).to(device, dtype), weights.to(device, dtype)
