"""The expectation of feedback learning over its noise, in closed form: no draws, and none of their variance.

The noise is small, so the dynamics are linear in it. In the coordinates y_i = J_i δv_i, r_L = y_L, the simulated
step of :class:`Sampled` reads, with w the control as the apical compartments have filtered it,

    w[t+1] = (1 − β) w[t] + β u[t],   y_i[t+1] = (1 − a) y_i[t] + a (J_i Q_i w[t+1] + y_{i−1}[t+1] + J_i n_i[t+1]).

The noise of layer k reaches the output through scalar filters only, the same for all its units: with H[p] the
response of u, p steps on, to a unit pulse on the output (n_L × n_L, one recursion a sample), and f_k the scalar
response of the output to a pulse in J_k n_k, the response of u to the noise of layer k is f_k ∗ H.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dfc_lightning.control.chain import Activity, Chain
from dfc_lightning.control.checks import require
from dfc_lightning.feedback_learning.sampled import Noise, Sampled

CLOSED_FORM_UP_TO = 20
"""Widest output for which the n_L × n_L responses of each sample are formed; wider ones are sampled."""


@dataclass(frozen=True)
class Expected(Sampled):
    """The mean over the noise of what :class:`Sampled` computes, to first order in the noise variance.

    With P_k = J_k J_kᵀ, σ̃ = σ √dt / τ_A and U_k = f_k ∗ H, the gradient of Q_i is the batch mean of Q_i A + J_iᵀ C_i,

        A = Σ_k σ̃_k² Σ_j (T − j) (g ∗ U_k)[j] P_k U_k[j+1]ᵀ,   C_i = σ̃_i² Σ_{j≥1} (T − j) (1 − β)^{j−1} U_i[j+1]ᵀ,

    over T steps, g the apical filter. Same arguments as :class:`Sampled`; ``instant_transmission`` is needed. Outputs
    wider than ``CLOSED_FORM_UP_TO`` are sampled instead: there the n_L × n_L factors would cost more than they save.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.instant_transmission or self.instant_system,
            "instant_transmission",
            self.instant_transmission,
            "the closed form is for instant transmission; use Sampled(...) for delayed transmission",
        )

    def gradient(self, chain: Chain, activity: Activity, noise: Noise) -> list[Tensor]:
        """The expected gradient for each Q_i, (n_i, n_L); ``noise`` is drawn from for wide outputs only."""
        if chain.widths[-1] > CLOSED_FORM_UP_TO:
            return super().gradient(chain, activity, noise)
        jacobians = chain.jacobians(activity.slopes)
        loop = torch.stack([j @ q for j, q in zip(jacobians, chain.feedback)], dim=1)  # J_i Q_i, (B, L, n_L, n_L)
        responses = self._control_responses(loop)  # H, (T + 1, B, n_L, n_L)
        last = self.sigma if self.sigma_output is None else self.sigma_output
        variances = [(s * self.dt**0.5 / self.apical_tau) ** 2 for s in [self.sigma] * (chain.depth - 1) + [last]]
        flat = responses.flatten(1)
        batch, n = responses.shape[1:3]
        accuracy = 1e-14 if flat.dtype == torch.float64 else 1e-6

        def over_time(weights: Tensor) -> Tensor:
            """Sums of H weighted over time, R blocks side by side for each row: (B, n, R, n)."""
            return (weights.to(flat) @ flat).view(-1, batch, n, n).permute(1, 2, 0, 3)

        both = torch.zeros_like(responses[0])
        crosses = []
        for k, (jacobian, variance) in enumerate(zip(jacobians, variances), start=1):
            left, right, single = _time_weights(self, chain.depth - k + 1, accuracy)
            spread = over_time(left).reshape(batch, -1, n) @ (variance * jacobian @ jacobian.mT)
            both += spread.view(batch, n, -1) @ over_time(right).reshape(batch, n, -1).mT
            crosses.append(variance * over_time(single).squeeze(2).mT)
        scale = 1 / (max(self.sigma, 0.01) ** 2 * self.steps * activity.batch_size)
        mean = both.sum(0)
        return [
            scale * (q @ mean + jacobian.flatten(0, 1).T @ cross.flatten(0, 1))
            for q, jacobian, cross in zip(chain.feedback, jacobians, crosses)
        ]

    def _control_responses(self, loop: Tensor) -> Tensor:
        """H[p], p = 0 … T: the control p steps after a unit pulse on the output, (T + 1, B, n_L, n_L)."""
        batch, depth, n, _ = loop.shape
        pi, step = self.controller, self.time_step
        apical = step.dt / self.apical_tau
        somatic = 1.0 if step.instant_system else step.dt / step.tau_ratio
        stacked = loop.reshape(batch, depth * n, n)
        responses = loop.new_zeros(self.steps + 1, batch, n, n)
        pulse = torch.eye(n, dtype=loop.dtype, device=loop.device).expand(batch, n, n)
        integral = u = heard = torch.zeros_like(responses[0])
        layers = [torch.zeros_like(u) for _ in range(depth)]
        error = -pulse
        for p in range(1, self.steps + 1):
            before = u
            leak = integral if pi.leak == "integral" else u
            integral = integral + step.dt * (error - pi.alpha * leak)
            u = torch.add(integral, error, alpha=pi.k_p, out=responses[p])
            heard = torch.lerp(heard, before, apical)
            driven = (stacked @ heard).view(batch, depth, n, n).unbind(1)
            arriving = driven[0]
            for i in range(depth):
                layers[i] = torch.lerp(layers[i], arriving, somatic)
                arriving = layers[i] + driven[i + 1] if i + 1 < depth else layers[i]
            error = -layers[-1]
        return responses


@lru_cache(maxsize=64)
def _time_weights(method: Expected, filters: int, accuracy: float) -> tuple[Tensor, Tensor, Tensor]:
    """The scalar weights of the sums over time, as applied to H, for noise ``filters`` somata from the output.

    The double sum's (T + 1) × (T + 1) weights come as ``left``ᵀ ``right`` with the R rows that ``accuracy`` needs.

    Returns:
        ``left`` and ``right``, (R, T + 1), and the weights of the single sum, (1, T + 1), in float64.
    """
    steps, step = method.steps, method.time_step
    apical = step.dt / method.apical_tau
    somatic = 1.0 if step.instant_system else step.dt / step.tau_ratio
    lags = torch.arange(steps + 1, dtype=torch.float64)
    remembered = torch.where(lags >= 1, (1 - apical) ** (lags - 1).clamp_min(0), torch.zeros_like(lags))
    soma = _convolution(somatic * (1 - somatic) ** lags if somatic < 1 else (lags == 0).double())
    pulse = remembered
    for _ in range(filters):
        pulse = soma @ pulse
    to_control = _convolution(pulse)  # f_k ∗
    to_heard = _convolution(apical * remembered) @ to_control  # g ∗ f_k ∗
    count = steps - lags[:-1]
    u, s, vh = torch.linalg.svd(to_heard[:-1].T @ (count.unsqueeze(1) * to_control[1:]))
    rank = int((s > accuracy * s[0]).sum())
    single = (count * remembered[:-1]) @ to_control[1:]
    return (u[:, :rank] * s[:rank]).T.contiguous(), vh[:rank].contiguous(), single.unsqueeze(0)


def _convolution(taps: Tensor) -> Tensor:
    """The lower triangular Toeplitz matrix that convolves with ``taps``."""
    n = len(taps)
    lag = torch.arange(n).unsqueeze(1) - torch.arange(n)
    return torch.where(lag >= 0, taps[lag.clamp_min(0)], taps.new_zeros(()))
