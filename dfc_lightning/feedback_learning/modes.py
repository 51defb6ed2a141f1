"""One draw of feedback learning beside wide outputs: a few functions of time stand for its steps.

To first order in the noise the control is u = Σ_k Z_k J_k σ̃_k n_k − Σ_i K_i G_i u (see :mod:`.loop`). The filters Z_k
integrate a noise that the apical compartments have smoothed already, and K_i are filters of theirs, so that u moves
slowly: with an orthonormal V, (T, R), of far fewer columns than steps, u = V û. Then all that counts of the noise are
two sets of R numbers a unit, Vᵀ Z_k n_k that drive the control and Vᵀ S N n_k that meet it in the update, and these are
drawn together, from Q ≤ 2R normal numbers instead of T. The R functions ride through the layers as rows of the batch:

    û = Σ_k J_k σ̃_k (Vᵀ Z_k n_k) − Σ_i (Vᵀ K_i V) J_i Q_i û,   −ΔQ_k ∝ Σ_r (Q_k (Vᵀ S w)_r + σ̃_k (Vᵀ S N n_k)_r) û_rᵀ,

the loop by a few turns. No n_L × n_L matrix of a sample is formed, as :mod:`.drawn` does for narrow outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dfc_lightning.control.chain import Activity, Chain
from dfc_lightning.feedback_learning.layers import able_units
from dfc_lightning.feedback_learning.loop import MOST_TURNS, Phase, filters

LOST = 1e-4
"""Share of the control's variance, before its loop is closed, that may be left out."""


@dataclass(frozen=True)
class Modes:
    """The scalar weights of a phase in R functions of time, for L layers."""

    draws: list[Tensor | None]
    """What takes the T draws of a unit of layer k to the Q that count, orthonormal, (Q, T); None without noise."""
    drive: list[Tensor]
    """From these Q to Vᵀ Z_k σ̃_k n_k, (R, Q)."""
    met: list[Tensor]
    """From these Q to Vᵀ S N σ̃_k n_k, (R, Q)."""
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
    draws: list[Tensor | None] = []
    drive, met = [], []
    for z, sigma in zip(found.to_control, sigmas):
        both = torch.cat([v.T @ z, v.T @ found.held])
        sizes = both.norm(dim=1, keepdim=True)
        u, s, w = torch.linalg.svd(both / sizes, full_matrices=False)
        count = int((s > 0.1 * math.sqrt(lost) * s[0]).sum())
        weights = sigma * sizes * u[:, :count] * s[:count]
        draws.append(w[:count].to(device, dtype) if sigma > 0 else None)
        drive.append(weights[:rank].to(device, dtype))
        met.append(weights[rank:].to(device, dtype))
    loop = -(v.T @ torch.stack(found.loop) @ v)
    return Modes(draws, drive, met, loop.to(device, dtype), (v.T @ found.heard @ v).to(device, dtype))


def drawn_in_modes(
    phase: Phase,
    chain: Chain,
    activity: Activity,
    sigmas: Sequence[float],
    noise: Callable[[tuple[int, int]], Tensor],
    gated: bool = False,
    lost: float = LOST,
) -> list[Tensor] | None:
    """Σ_b Σ_t v_i^fb uᵀ for each layer, (n_i, n_L), for noise of standard deviation σ̃_i in layer i.

    Args:
        phase: the phase.
        chain: the controlled chain.
        activity: its feedforward activity.
        sigmas: σ̃_i.
        noise: source of standard normal draws of the shapes it asks for.
        gated: of the units alone whose rates can move.
        lost: the share of the control's variance that may be left out.

    Returns:
        The sums; None where few functions of time do not suffice, or turns of the loop do not settle.
    """
    output = activity.output
    plan = modes(phase, tuple(sigmas), lost, output.dtype, output.device)
    if plan is None:
        return None
    silent = output.new_zeros(())
    inner = [
        silent if rows is None else _drawn(noise, len(output), len(rows), width)
        for rows, width in zip(plan.draws, chain.widths)
    ]
    pushes = [e if rows is None else _mixed(w, e) for rows, w, e in zip(plan.draws, plan.drive, inner)]
    u = _settled(chain, activity.slopes, chain.linear_response(activity, pushes), plan.loop, math.sqrt(lost))
    if u is None:
        return None
    met, heard = u.flatten(0, 1), _mixed(plan.heard, u)
    answer = heard.flatten(0, 1).T @ met
    able = able_units(chain, activity) if gated else []
    found = []
    for k, (q, w, e) in enumerate(zip(chain.feedback, plan.met, inner)):
        fed = None if plan.draws[k] is None else _mixed(w, e)
        if gated:
            back = heard @ q.T
            fed = (back if fed is None else back.add_(fed)).mul_(able[k])
            found.append(fed.flatten(0, 1).T @ met)
        else:
            found.append(q @ answer if fed is None else torch.addmm(q @ answer, fed.flatten(0, 1).T, met))
    return found


def _settled(chain: Chain, slopes: list[Tensor], alone: Tensor, loop: Tensor, accuracy: float) -> Tensor | None:
    """û of û = û_0 + Σ_i L_i J_i Q_i û, from û_0, (R, B, n_L), to ``accuracy``; None if its turns do not settle."""
    u, moved = alone, float(alone.norm())
    for _ in range(MOST_TURNS):
        turned = _mixed(loop.flatten(0, 1), u).split(len(u))
        fed = [each @ q.T for each, q in zip(turned, chain.feedback[:-1])]
        fed.append(turned[-1] if chain.plain_output else turned[-1] @ chain.feedback[-1].T)
        before, u = u, alone + chain.linear_response(slopes, fed)
        size, last = float(u.norm()), moved
        moved = float((u - before).norm())
        if not moved <= last:
            return None
        if moved * moved <= 0.1 * accuracy * size * last:  # the next turn would move less than that
            return u
    return None


def _drawn(noise: Callable[[tuple[int, int]], Tensor], batch: int, count: int, width: int) -> Tensor:
    """Standard normal draws, (Q, B, n_k), whose batch comes first where they are drawn."""
    return noise((batch, count * width)).view(batch, count, width).transpose(0, 1).contiguous()


def _mixed(weights: Tensor, functions: Tensor) -> Tensor:
    """Other functions of time made of those in the first dimension: (R', R) and (R, B, n) give (R', B, n)."""
    return (weights @ functions.flatten(1)).view(-1, *functions.shape[1:])
