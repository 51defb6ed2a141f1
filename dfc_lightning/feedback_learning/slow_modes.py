"""One draw of feedback learning beside wide outputs: a few functions of time stand for its steps.

To first order in the noise the control is u = Σ_k Z_k J_k σ̃_k n_k − Σ_i K_i G_i u (see :mod:`.phase`). The filters Z_k
integrate a noise that the apical compartments have smoothed already, and K_i are filters of theirs, so that u moves
slowly: with an orthonormal V, (T, R), of far fewer columns than steps, u = V û. Then all that counts of the noise are
two sets of R numbers a unit, Vᵀ Z_k n_k that drive the control and Vᵀ S N n_k that meet it in the update, and these are
drawn together, from Q ≤ 2R normal numbers instead of T. The R functions ride through the layers as rows of the batch:

    û = Σ_k J_k σ̃_k (Vᵀ Z_k n_k) − Σ_i (Vᵀ K_i V) J_i Q_i û,   −ΔQ_k ∝ Σ_r (Q_k (Vᵀ S w)_r + σ̃_k (Vᵀ S N n_k)_r) û_rᵀ,

the loop by a few turns. No n_L × n_L matrix of a sample is formed, as :mod:`.matheron` does for narrow outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, singledispatch
from typing import NamedTuple

import torch
from torch import Tensor

from dfc_lightning.feedback_learning.method import Noise
from dfc_lightning.feedback_learning.phase import MOST_TURNS, Phase, filters
from dfc_lightning.passes.dense import DensePass
from dfc_lightning.passes.forward_pass import ForwardPass

LOST = 1e-4
"""Share of the control's variance, before its loop is closed, that may be left out."""


class NoiseModes(NamedTuple):
    """What counts of a layer's noise, σ̃_k n_k."""

    draws: Tensor
    """What takes the T draws of a unit to the Q that count, orthonormal, (Q, T)."""
    drive: Tensor
    """From these Q to Vᵀ Z_k σ̃_k n_k, (R, Q)."""
    met: Tensor
    """From these Q to Vᵀ S N σ̃_k n_k, (R, Q)."""


@dataclass(frozen=True)
class Modes:
    """The scalar weights of a phase in R functions of time, for L layers."""

    noises: list[NoiseModes | None]
    """Of each layer; None without noise."""
    loop: Tensor
    """−Vᵀ K_i V, (L, R, R)."""
    heard: Tensor
    """Vᵀ (β S N S) V, (R, R)."""


@lru_cache(maxsize=16)
def modes(
    phase: Phase, sigmas: tuple[float, ...], lost: float, dtype: torch.dtype, device: torch.device
) -> Modes | None:
    """The weights that leave out ``lost`` of the variance of what each layer's noise does to the control.

    None if so many functions are needed that stepping through time costs no more.
    """
    found = filters(phase)
    noisy = [z / z.norm() for z, sigma in zip(found.to_control, sigmas) if sigma > 0]
    basis, _, _ = torch.linalg.svd(torch.cat(noisy, dim=1), full_matrices=False)
    left = 1 - torch.stack([(basis.T @ z).square().sum(1).cumsum(0) for z in noisy]).amin(0)
    rank = int((left > lost).sum()) + 1
    if rank > phase.steps // 3:
        return None
    v = basis[:, :rank]

    def of_layer(z: Tensor, sigma: float) -> NoiseModes | None:
        if sigma == 0:
            return None
        return NoiseModes(*(t.to(device, dtype) for t in _noise_modes(v.T @ z, v.T @ found.held, sigma, lost)))

    noises = [of_layer(z, sigma) for z, sigma in zip(found.to_control, sigmas)]
    loop = -(v.T @ torch.stack(found.loop) @ v)
    return Modes(noises, loop.to(device, dtype), (v.T @ found.heard @ v).to(device, dtype))


def _noise_modes(drive: Tensor, met: Tensor, sigma: float, lost: float) -> NoiseModes:
    """The weights of a noise of standard deviation ``sigma`` that counts by Vᵀ Z_k and Vᵀ S N, (R, T) each."""
    both = torch.cat([drive, met])
    sizes = both.norm(dim=1, keepdim=True)
    u, s, rows = torch.linalg.svd(both / sizes, full_matrices=False)
    count = int((s > 0.1 * math.sqrt(lost) * s[0]).sum())
    weights = sigma * sizes * u[:, :count] * s[:count]
    return NoiseModes(rows[:count], weights[: len(drive)], weights[len(drive) :])


@singledispatch
def drawn_in_modes(
    forward: ForwardPass,
    phase: Phase,
    sigmas: Sequence[float],
    noise: Noise,
    gated: bool = False,
    lost: float = LOST,
) -> list[Tensor] | None:
    """Σ_b Σ_t v_i^fb uᵀ for each layer, (n_i, n_L), for noise of standard deviation σ̃_i in layer i.

    Args:
        forward: the feedforward pass.
        phase: the phase.
        sigmas: σ̃_i.
        noise: source of standard normal draws of the shapes it asks for.
        gated: of the units alone whose rates can move.
        lost: the share of the control's variance that may be left out.

    Returns:
        The sums; None where few functions of time do not suffice, turns of the loop do not settle, or the network is
        no chain: elsewhere, each function of time would need a pass of its own.
    """
    return None


@drawn_in_modes.register
def _(
    forward: DensePass,
    phase: Phase,
    sigmas: Sequence[float],
    noise: Noise,
    gated: bool = False,
    lost: float = LOST,
) -> list[Tensor] | None:
    output = forward.output
    plan = modes(phase, tuple(sigmas), lost, output.dtype, output.device)
    if plan is None:
        return None
    inner = [
        None if of_noise is None else _drawn(noise, len(output), len(of_noise.draws), width)
        for of_noise, width in zip(plan.noises, forward.widths)
    ]
    silent = output.new_zeros(())
    pushes = [silent if m is None or e is None else _mixed(m.drive, e) for m, e in zip(plan.noises, inner)]
    u = _settled(forward, forward.linear_response(pushes), plan.loop, math.sqrt(lost))
    if u is None:
        return None
    fed = (None if m is None or e is None else _mixed(m.met, e) for m, e in zip(plan.noises, inner))  # one at a time
    heard = _mixed(plan.heard, u)
    return _gated_sums(forward, heard, fed, u) if gated else _sums(forward, heard, fed, u)


def _sums(forward: DensePass, heard: Tensor, fed: Iterable[Tensor | None], u: Tensor) -> list[Tensor]:
    """Σ_b Σ_r (Q_k heard_r + fed_kr) û_rᵀ for each layer k."""
    met = u.flatten(0, 1)
    answer = heard.flatten(0, 1).T @ met
    return [
        q @ answer if noise is None else torch.addmm(q @ answer, noise.flatten(0, 1).T, met)
        for q, noise in zip(forward.feedback, fed)
    ]


def _gated_sums(forward: DensePass, heard: Tensor, fed: Iterable[Tensor | None], u: Tensor) -> list[Tensor]:
    """The same of the units alone whose rates can move."""
    met, found = u.flatten(0, 1), []
    for q, noise, able in zip(forward.feedback, fed, forward.able):
        back = heard @ q.T
        back = (back if noise is None else back.add_(noise)).mul_(able)
        found.append(back.flatten(0, 1).T @ met)
    return found


def _settled(forward: DensePass, alone: Tensor, loop: Tensor, accuracy: float) -> Tensor | None:
    """û of û = û_0 + Σ_i L_i J_i Q_i û, from û_0, (R, B, n_L), to ``accuracy``; None if its turns do not settle."""
    u, moved = alone, float(alone.norm())
    for _ in range(MOST_TURNS):
        turned = _mixed(loop.flatten(0, 1), u).split(len(u))
        fed = [each @ q.T for each, q in zip(turned, forward.feedback[:-1])]
        fed.append(turned[-1] if forward.plain_output else turned[-1] @ forward.feedback[-1].T)
        before, u = u, alone + forward.linear_response(fed)
        size, last = float(u.norm()), moved
        moved = float((u - before).norm())
        if not moved <= last:
            return None
        if moved * moved <= 0.1 * accuracy * size * last:  # the next turn would move less than that
            return u
    return None


def _drawn(noise: Noise, batch: int, count: int, width: int) -> Tensor:
    """Standard normal draws, (Q, B, n_k), whose batch comes first where they are drawn."""
    return noise((batch, count * width)).view(batch, count, width).transpose(0, 1).contiguous()


def _mixed(weights: Tensor, functions: Tensor) -> Tensor:
    """Other functions of time made of those in the first dimension: (R', R) and (R, B, n) give (R', B, n)."""
    return (weights @ functions.flatten(1)).view(-1, *functions.shape[1:])
