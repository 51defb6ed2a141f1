"""The feedback phase to first order in its noise: scalar filters in time around n_L × n_L gains.

The noise is small, so the dynamics are linear in it. In the coordinates y_i = J_i δv_i, r_L = y_L, step t of the
simulation (Meulemans et al. 2021, Eqs. 1, 4 and 12) reads, with a = dt/τ_v and β = dt/τ_A,

    u[t] = PI(−y_L[t−1]),   w[t] = (1 − β) w[t−1] + β u[t−1],   η_i[t] = (1 − β) η_i[t−1] + σ̃_i n_i[t],
    y_i[t] = (1 − a) y_i[t−1] + a (J_i Q_i w[t] + J_i η_i[t] + y_{i−1}[t]),   ΔQ_i ∝ −Σ_t (Q_i w + η_i)[t−1] u[t]ᵀ.

All but the gains G_i = J_i Q_i are filters in time, the same for all samples and outputs. As T × T lower triangular
Toeplitz matrices, with S the shift by one step, N and F the apical and somatic filters, C the controller and
Φ_i = F^{L−i+1} (times S^{L−i} if transmission is delayed), the control obeys

    u = Σ_k Z_k J_k σ̃_k n_k − Σ_i K_i G_i u,   Z_k = −C S Φ_k N,   K_i = β C S Φ_i N S,

where filters act on time and gains on outputs, so that the two commute. A phase lasts for a fraction of the time
constants, which makes every turn of the loop K G small: a few turns give u to machine precision. :func:`turns` bounds
how many; where gains are too large for that, :func:`step_through` goes step by step instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dfc_lightning.settling.controller import PIController
from dfc_lightning.settling.time_step import TimeStep

MOST_TURNS = 10
"""Turns of the loop from which on stepping through time is cheaper, and safer where the loop is unstable."""


@dataclass(frozen=True)
class Phase:
    """The linearised feedback phase of a chain.

    Args:
        steps: number of steps, T.
        time_step: the discretisation.
        controller: the controller.
        depth: layers, L.
    """

    steps: int
    time_step: TimeStep
    controller: PIController
    depth: int


@dataclass(frozen=True)
class Filters:
    """The filters of a phase, (T, T) each, float64."""

    to_control: list[Tensor]
    """Z_k of each layer."""
    further: list[Tensor]
    """E_k of each layer: Z_k = E_k Z_L."""
    loop: list[Tensor]
    """K_i of each layer."""
    heard: Tensor
    """β S N S: from u to the w that meets u in the update."""
    held: Tensor
    """S N: from n_i to the η_i / σ̃_i that meets u in the update."""


@lru_cache(maxsize=64)
def filters(phase: Phase) -> Filters:
    """The filters of a phase."""
    step, lags = phase.time_step, torch.arange(phase.steps, dtype=torch.float64)
    apical, somatic = step.apical_share, step.somatic_share
    shift = _convolution((lags == 1).double())
    memory = _convolution((1 - apical) ** lags)
    crossed = _convolution(somatic * (1 - somatic) ** lags)
    further = [_convolution((lags == 0).double())]
    for _ in range(phase.depth - 1):
        further.insert(0, further[0] @ (crossed @ shift if step.delayed else crossed))
    last = _convolution(_controller_response(phase)) @ shift @ crossed @ memory
    return Filters(
        to_control=[-last @ f for f in further],
        further=further,
        loop=[apical * last @ f @ shift for f in further],
        heard=apical * shift @ memory @ shift,
        held=shift @ memory,
    )


def largest_gain(gains: Tensor) -> float:
    """A bound on the largest Σ_i ‖G_i‖₂ of a sample, rounded up to a power of ⁴√2 so that plans for it can be kept.

    Args:
        gains: G_i, (B, L, n_L, n_L).
    """
    size = gains.abs()
    bound = float((size.sum(2).amax(2) * size.sum(3).amax(2)).sqrt().sum(1).max()) if gains.numel() else 0.0
    if not bound < math.inf:
        return math.inf
    return 2.0 ** (math.ceil(4 * math.log2(max(bound, 1e-3))) / 4)


@lru_cache(maxsize=256)
def turns(phase: Phase, gain: float, accuracy: float) -> int | None:
    """Turns of the loop that leave a relative error of ``accuracy`` in u; None if they are too many.

    A soma's filter only averages, so that a turn by layer L bounds all others.
    """
    found = filters(phase)
    signal, turn = found.to_control[-1][:, 0], found.loop[-1].abs()
    left, size = signal.abs(), signal.norm()
    for count in range(MOST_TURNS + 1):
        left = gain * (turn @ left)
        if left.norm() <= accuracy * size:
            return count
    return None


def merged(matrices: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Few matrices M'_q and weights o with M_i ≈ Σ_q o_qi M'_q, to ``tolerance`` in the norm of all.

    Neighbouring layers' filters differ by a short delay, so that fewer than L make up the sum over layers.

    Args:
        matrices: M_i, (L, …).
        tolerance: what may be left out.

    Returns:
        M', (Q, …), and the weights, (Q, L).
    """
    u, s, vh = torch.linalg.svd(matrices.flatten(1), full_matrices=False)
    rank = max(1, int((s > tolerance).sum()))
    return (s[:rank, None] * vh[:rank]).view(rank, *matrices.shape[1:]), u[:, :rank].T


def step_through(phase: Phase, gains: Tensor, alone: Tensor) -> Tensor:
    """The u of u = u_0 − Σ_i K_i G_i u, by stepping through time.

    Args:
        phase: the phase.
        gains: G_i, (B, L, n_L, n_L).
        alone: u_0, the control without the loop, (T, B, n_L, m).
    """
    pi, step = phase.controller, phase.time_step
    controls = alone.clone()
    layers = [torch.zeros_like(alone[0]) for _ in range(phase.depth)]
    by_layer = gains.transpose(0, 1)
    integral = answer = heard = before = torch.zeros_like(alone[0])
    for u in controls:
        leak = integral if pi.leak == "integral" else answer
        integral = integral - step.dt * (layers[-1] + pi.alpha * leak)
        answer = integral - pi.k_p * layers[-1]
        u += answer
        heard = torch.lerp(heard, before, step.apical_share)
        before = u
        arriving: Tensor | None = None
        for i, driven in enumerate(by_layer @ heard):
            target = driven if arriving is None else driven + arriving
            arriving = layers[i]
            layers[i] = torch.lerp(layers[i], target, step.somatic_share)
            if not step.delayed:
                arriving = layers[i]
    return controls


def _controller_response(phase: Phase) -> Tensor:
    """The controller's response to a pulse in the error, (T,)."""
    pi, dt = phase.controller, phase.time_step.dt
    response, integral, u = [], 0.0, 0.0
    for error in [1.0] + [0.0] * (phase.steps - 1):
        integral += dt * (error - pi.alpha * (integral if pi.leak == "integral" else u))
        u = integral + pi.k_p * error
        response.append(u)
    return torch.tensor(response, dtype=torch.float64)


def _convolution(taps: Tensor) -> Tensor:
    """The lower triangular Toeplitz matrix that convolves with ``taps``."""
    n = len(taps)
    lag = torch.arange(n).unsqueeze(1) - torch.arange(n)
    return torch.where(lag >= 0, taps[lag.clamp_min(0)], taps.new_zeros(()))
