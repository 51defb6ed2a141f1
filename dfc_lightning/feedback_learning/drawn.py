"""One draw of feedback learning with the law of its simulation, without simulating the units.

To first order in the noise, the control depends on the noise n_k[t] of a layer only through its n_L numbers
J_k n_k[t] (see :mod:`.loop`). With the control u, (n_L, T), known, the update of a sample is

    −ΔQ_k ∝ Q_k Σ_t (S w)[t] u[t]ᵀ + σ̃_k N_k ũᵀ,   ũ = u S N,

N_k the (n_k, T) draws. The first term needs no units. Of the second, the part of N_k in the row space of J_k is known
already, and the rest is independent of u: given u, N_k ũᵀ is Gaussian, with independent rows of covariance ũ ũᵀ. So
it is drawn as Z Sᵀ, with S Sᵀ = ũ ũᵀ and only n_L draws a unit, and moved to where it agrees with what is known of it
(Matheron's rule): with J_k J_kᵀ = R Rᵀ and J_k N_k = R E, E standard normal,

    N_k ũᵀ = Z Sᵀ + J_kᵀ (R Rᵀ)⁻¹ (R E ũᵀ − J_k Z Sᵀ).

It is a draw of the same distribution, at a tenth of the cost. A layer of few units has its N_k drawn as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from dfc_lightning.feedback_learning.layers import AnyActivity, Layers, able_units, gated_product, jacobians_and_gains
from dfc_lightning.feedback_learning.loop import (
    Phase,
    filters,
    largest_gain,
    merged,
    step_through,
    turns,
)


def drawn(
    phase: Phase,
    layers: Layers,
    activity: AnyActivity,
    sigmas: Sequence[float],
    noise: Callable[[tuple[int, int]], Tensor],
    gated: bool = False,
) -> list[Tensor]:
    """Σ_b Σ_t v_i^fb uᵀ for each layer, (n_L, n_i), for noise of standard deviation σ̃_i in layer i.

    ``gated``: of the units alone whose rates can move.
    """
    jacobians, gains = jacobians_and_gains(layers, activity)
    output = activity.output
    batch, n = output.shape
    held, heard, *to_control = _filters(phase, output.dtype, output.device)
    latent = [width > n < phase.steps for width in layers.widths]
    noisy = [sigma > 0 for sigma in sigmas]
    alone = output.new_zeros(batch * n, phase.steps)
    inner: list[Tensor] = []  # draws of N_k, or of E
    roots: list[Tensor] = []  # what takes them to the output, J_k or R
    for k, (jacobian, sigma) in enumerate(zip(jacobians, sigmas)):
        roots.append(_root(jacobian @ jacobian.mT) if noisy[k] and latent[k] else jacobian)
        inner.append(noise((batch, roots[k].shape[2] * phase.steps * noisy[k])).view(batch, -1, phase.steps))
        if noisy[k]:
            alone.addmm_((roots[k] @ inner[k]).view(batch * n, -1), to_control[k], alpha=sigma)
    u = _controlled(phase, gains, alone.view(batch, n, -1))
    answer = u @ (u @ heard).mT  # Σ u (S w)ᵀ
    able = able_units(layers, activity) if gated else []
    met = u @ held
    spread = _root(met @ met.mT)
    totals = []
    for k, (q, jacobian, root, sigma) in enumerate(zip(layers.feedback, jacobians, roots, sigmas)):
        total = gated_product(q, answer.mT, able[k]).T.contiguous() if gated else answer.sum(0) @ q.T
        if noisy[k]:
            own = met @ inner[k].mT
            if latent[k]:
                z = noise((batch, n * layers.widths[k])).view(batch, n, -1)
                own = own - spread @ torch.linalg.solve_triangular(root, jacobian @ z.mT, upper=False).mT
                own = torch.linalg.solve_triangular(root, own, upper=False, left=False)
                z = z * able[k].unsqueeze(1) if gated else z
                total += sigma * (_side_by_side(spread) @ z.flatten(0, 1) + _side_by_side(own) @ jacobian.flatten(0, 1))
            else:
                total += sigma * (own * able[k].unsqueeze(1) if gated else own).sum(0)
        totals.append(total)
    return totals


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


def _side_by_side(blocks: Tensor) -> Tensor:
    """(B, n, m) as (n, B m): a product with rows stacked over the batch then sums over the batch."""
    return blocks.transpose(0, 1).reshape(blocks.shape[1], -1)


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
