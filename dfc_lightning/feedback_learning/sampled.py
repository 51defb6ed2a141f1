"""Learning the feedback weights from noise, by simulation (Meulemans et al. 2021, Eq. 12)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor

from dfc_lightning.errors import require
from dfc_lightning.feedback_learning.layers import LayerGroups
from dfc_lightning.feedback_learning.matheron import drawn
from dfc_lightning.feedback_learning.method import FeedbackMethod, Noise
from dfc_lightning.feedback_learning.phase import Phase
from dfc_lightning.feedback_learning.slow_modes import drawn_in_modes
from dfc_lightning.passes.dense import DensePass
from dfc_lightning.passes.forward_pass import ForwardPass
from dfc_lightning.settling.controller import PIController
from dfc_lightning.settling.dynamics import dynamics_of, stacked_noise
from dfc_lightning.settling.time_step import TimeStep

DRAWN_UP_TO = 28
"""Widest output for which :meth:`Sampled.draw` forms each sample's J_i; beyond, it takes few functions of time."""


@singledispatch
def reducible(forward: ForwardPass) -> DensePass | None:
    """The pass itself if it is one of a chain whose output is wider than the layer before it can move, else None."""
    return None


@reducible.register
def _(forward: DensePass) -> DensePass | None:
    return forward if forward.reducible else None


@dataclass(frozen=True)
class Sampled(FeedbackMethod):
    """dQ_i/dt ∝ −v_i^fb uᵀ, with the network's own output for a target and noise in the apical compartments.

    An Euler-Maruyama simulation; the control is not proactive. With its L2 decay in the optimizer, Theorem 6 has
    it turn Q towards Jᵀ(JJᵀ + γI)⁻¹. The gradient is divided by the noise variance, or by 0.01² where that is more.

    Args:
        steps: number of steps; the published ``tmax_fb`` counts states, so its value less one.
        dt: length of a step in units of τ_u.
        tau_ratio: somatic time constant τ_v / τ_u.
        apical_tau: apical time constant τ_A / τ_u.
        alpha: leakage of the controller.
        k_p: proportional gain of the controller.
        leak: what leaks; see :class:`PIController`.
        sigma: standard deviation of the noise in hidden layers.
        sigma_output: that in the output layer; None for the same.
        instant_transmission: rates of this step, not of the last, reach the next layer.
        instant_system: somata follow their compartments at once.
        gated: of each sample, only units whose rate the apical compartment can move learn, and the mean is over
            these: φ'(v_i) is not zero, and the unit does not lose in max-pooling. Q_i then follows what is fed back to
            a unit while it is active, where without it the samples that silence a unit make its feedback fade. Not in
            the paper, whose units are never silent.
    """

    steps: int = 47
    dt: float = 2e-3
    tau_ratio: float = 6e-3
    apical_tau: float = 0.3
    alpha: float = 0.6
    k_p: float = 0.15
    leak: str = "control"
    sigma: float = 0.01
    sigma_output: float | None = None
    instant_transmission: bool = True
    instant_system: bool = False
    gated: bool = False

    def __post_init__(self) -> None:
        require(self.steps >= 2, "steps", self.steps, "the first step gives no update; simulate two or more")
        require(self.sigma > 0, "sigma", self.sigma, "feedback weights learn from noise; give a value above zero")
        require(
            self.sigma_output is None or self.sigma_output >= 0,
            "sigma_output",
            self.sigma_output,
            "give a standard deviation of zero or more",
        )
        self.time_step, self.controller  # noqa: B018  each checks its own arguments

    @property
    def time_step(self) -> TimeStep:
        """The discretisation."""
        scales = self.dt, self.tau_ratio, self.apical_tau
        return TimeStep(*scales, self.instant_transmission, self.instant_system, proactive=False)

    @property
    def controller(self) -> PIController:
        """The controller of this phase."""
        return PIController(self.alpha, self.k_p, self.leak)  # type: ignore[arg-type]

    def gradient(self, forward: ForwardPass, noise: Noise) -> list[Tensor]:
        """The gradient for Q_i of each point, (n_i, n_L), to be descended: mean over batch and time of v_i^fb uᵀ / σ².

        The nonlinear network is simulated, unit by unit.

        Args:
            forward: the feedforward pass, bound to the feedback weights Q_i.
            noise: source of standard normal draws, one call a step. Without noise in an output that is wider than the
                layer before it, the output's draws are fewer: only what that layer can move is simulated.
        """
        return self._in_range(self._simulated, forward, noise)

    def draw(self, forward: ForwardPass, noise: Noise) -> list[Tensor]:
        """A gradient with the law of :meth:`gradient` to first order in σ, without simulating the units.

        See :mod:`.matheron`, and :mod:`.slow_modes` for chains of more than ``DRAWN_UP_TO`` outputs, where the law has
        relative errors of 1e-4. Where neither does, the units are simulated: wide outputs of other networks, and such
        as have noise of their own under much proportional gain, which moves the control at every step.

        Args:
            forward: the feedforward pass, bound to the feedback weights Q_i.
            noise: source of standard normal draws of the shapes it asks for.
        """
        return self._in_range(self._drawn, forward, noise)

    def _in_range(
        self, method: Callable[[ForwardPass, Noise], list[Tensor]], forward: ForwardPass, noise: Noise
    ) -> list[Tensor]:
        """The gradient by ``method``, in the range of W_L where the output stays in it."""
        chain = self._reducible(forward)
        if chain is None:
            return method(forward, noise)
        small, basis = chain.reduced()
        *hidden, output = method(small, noise)
        return [*(g @ basis.T for g in hidden), basis @ output @ basis.T]

    def _reducible(self, forward: ForwardPass) -> DensePass | None:
        return reducible(forward) if self.sigma_output == 0 else None

    def _drawn(self, forward: ForwardPass, noise: Noise) -> list[Tensor]:
        layers = LayerGroups(forward)
        phase, sigmas = self.phase(layers.depth), self._relative_sigmas(layers.depth)
        found: list[Tensor] | None
        if forward.outputs <= DRAWN_UP_TO:
            found = layers.by_point([total.T for total in drawn(layers, phase, sigmas, noise, self.gated)])
        else:
            found = drawn_in_modes(forward, phase, sigmas, noise, self.gated)
        if found is None:
            return self._simulated(forward, noise)
        scale = self._scale(forward) * self._kick**2
        return [total * scale for total in found]

    def _simulated(self, forward: ForwardPass, noise: Noise) -> list[Tensor]:
        layers, output, widths = LayerGroups(forward), forward.output, forward.widths
        sigmas = layers.of_points(self._relative_sigmas(layers.depth))
        dynamics = dynamics_of(forward, torch.zeros_like(output), self.controller, self.time_step)
        kick = stacked_noise(sigmas, widths, output) * self._kick
        able = torch.cat(forward.able, dim=1) if self.gated else None
        total = output.new_zeros(sum(widths), forward.outputs)
        for _ in range(self.steps):
            dynamics.advance_control()
            apical = dynamics.stacked_apical if able is None else dynamics.stacked_apical * able
            total.addmm_(apical.T, dynamics.u)
            dynamics.advance_compartments(noise((forward.batch_size, sum(widths))).mul_(kick))
        return list((total * self._scale(forward)).split(list(widths)))

    def phase(self, depth: int) -> Phase:
        """The linearised phase of a network of that depth."""
        return Phase(self.steps, self.time_step, self.controller, depth)

    def _relative_sigmas(self, depth: int) -> list[float]:
        """Standard deviation of each layer's noise in units of σ."""
        last = 1.0 if self.sigma_output is None else self.sigma_output / self.sigma
        return [1.0] * (depth - 1) + [last]

    @property
    def _kick(self) -> float:
        """σ̃, what noise of standard deviation σ adds to an apical voltage in a step."""
        return self.sigma * self.dt**0.5 / self.apical_tau

    def _scale(self, forward: ForwardPass) -> float:
        """What makes a gradient of Σ_b Σ_t v_i^fb uᵀ."""
        return 1 / (max(self.sigma, 0.01) ** 2 * self.steps * forward.batch_size)
