"""Learning the feedback weights from noise, by simulation (Meulemans et al. 2021, Eq. 12)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dfc_lightning.control.chain import Activity, Chain
from dfc_lightning.control.checks import require
from dfc_lightning.control.controller import PIController
from dfc_lightning.control.graph import Graph
from dfc_lightning.control.layered import Layered
from dfc_lightning.control.wiring import GraphActivity
from dfc_lightning.feedback_learning.drawn import drawn
from dfc_lightning.feedback_learning.layers import AnyActivity, Layers, able_units, outputs
from dfc_lightning.feedback_learning.loop import Phase
from dfc_lightning.feedback_learning.modes import drawn_in_modes
from dfc_lightning.settling.dynamics import ControlledDynamics, Dynamics, TimeStep, stacked_noise
from dfc_lightning.settling.graph_dynamics import GraphDynamics

Noise = Callable[[tuple[int, int]], Tensor]
"""A source of standard normal draws of the shape (B, …) it is asked for."""

Gradient = Callable[[Layers, AnyActivity, Noise], list[Tensor]]
"""Takes what :meth:`FeedbackMethod.gradient` does."""

DRAWN_UP_TO = 28
"""Widest output for which :meth:`Sampled.draw` forms each sample's J_i; beyond, it takes few functions of time."""


class FeedbackMethod(ABC):
    """How the gradient of the feedback weights is had."""

    gated: bool = False
    """Whether a gradient is summed over the samples alone in which a unit's rate can move; see :class:`Sampled`."""

    @abstractmethod
    def gradient(self, chain: Layers, activity: AnyActivity, noise: Noise) -> list[Tensor]:
        """The gradient for each Q_i, (n_i, n_L), to be descended.

        Args:
            chain: the controlled chain.
            activity: its feedforward activity.
            noise: source of standard normal draws.
        """

    def draw(self, chain: Layers, activity: AnyActivity, noise: Noise) -> list[Tensor]:
        """What a feedback learning step descends: a gradient of the same law as :meth:`gradient`, however drawn."""
        return self.gradient(chain, activity, noise)

    def every_nth_sample(self, chain: Layers | Graph) -> int:
        """Which part of the samples a feedback learning step need take for :meth:`draw`: 1 for all of them."""
        return 1


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
        return TimeStep(
            self.dt,
            self.tau_ratio,
            self.apical_tau,
            self.instant_transmission,
            self.instant_system,
            proactive=False,
        )

    @property
    def controller(self) -> PIController:
        """The controller of this phase."""
        return PIController(self.alpha, self.k_p, self.leak)  # type: ignore[arg-type]

    def gradient(self, chain: Layers, activity: AnyActivity, noise: Noise) -> list[Tensor]:
        """The gradient for each Q_i, (n_i, n_L), to be descended: mean over batch and time of v_i^fb uᵀ / σ².

        The nonlinear network is simulated, unit by unit.

        Args:
            chain: the controlled chain.
            activity: its feedforward activity.
            noise: source of standard normal draws, one call a step. Without noise in an output that is wider than the
                layer before it, the output's draws are fewer: only what that layer can move is simulated.
        """
        return self._in_range(self._simulated, chain, activity, noise)

    def draw(self, chain: Layers, activity: AnyActivity, noise: Noise) -> list[Tensor]:
        """A gradient with the law of :meth:`gradient` to first order in σ, without simulating the units.

        See :mod:`.drawn`, and :mod:`.modes` for chains of more than ``DRAWN_UP_TO`` outputs, where the law has relative
        errors of 1e-4. Where neither does, the units are simulated: wide outputs of graphs, and such as have noise of
        their own under much proportional gain, which moves the control at every step.

        Args:
            chain: the controlled chain, or the layers of a graph.
            activity: its feedforward activity.
            noise: source of standard normal draws of the shapes it asks for.
        """
        return self._in_range(self._drawn, chain, activity, noise)

    def _in_range(self, method: Gradient, chain: Layers, activity: AnyActivity, noise: Noise) -> list[Tensor]:
        """The gradient by ``method``, in the range of W_L where the output stays in it."""
        if not self._reduces(chain):
            return method(chain, activity, noise)
        assert isinstance(chain, Chain) and isinstance(activity, Activity)
        small, same, basis = chain.reduced(activity)
        *hidden, output = method(small, same, noise)
        return [*(g @ basis.T for g in hidden), basis @ output @ basis.T]

    def _reduces(self, chain: Layers | Graph) -> bool:
        return self.sigma_output == 0 and chain.reducible

    def _drawn(self, chain: Layers, activity: AnyActivity, noise: Noise) -> list[Tensor]:
        arguments = activity, self._relative_sigmas(chain.depth), noise, self.gated
        found: list[Tensor] | None
        if outputs(chain) <= DRAWN_UP_TO:
            found = [total.T for total in drawn(self.phase(chain.depth), chain, *arguments)]
        elif isinstance(chain, Chain):
            found = drawn_in_modes(self.phase(chain.depth), chain, *arguments)  # type: ignore[arg-type]
        else:
            found = None
        if found is None:
            return self._simulated(chain, activity, noise)
        scale = self._scale(activity) * (self.sigma * self.dt**0.5 / self.apical_tau) ** 2
        return [total * scale for total in found]

    def _simulated(self, chain: Layers, activity: AnyActivity, noise: Noise) -> list[Tensor]:
        still, sigmas = torch.zeros_like(activity.output), self._relative_sigmas(chain.depth)
        dynamics: ControlledDynamics
        if isinstance(chain, Layered):
            assert isinstance(activity, GraphActivity)
            dynamics = GraphDynamics(chain.graph, activity, still, self.controller, self.time_step)
            sigmas, widths = chain.of_points(sigmas), chain.graph.widths
        else:
            assert isinstance(activity, Activity)
            dynamics = Dynamics(chain, activity, still, self.controller, self.time_step)
            widths = chain.widths
        kick = stacked_noise(sigmas, widths, activity.output) * (self.sigma * self.dt**0.5 / self.apical_tau)
        total = activity.output.new_zeros(sum(widths), outputs(chain))
        able: Tensor | None = None
        if self.gated:
            masks = [m.T for m in able_units(chain, activity)]
            able = torch.cat(chain.apart(masks) if isinstance(chain, Layered) else masks).T
        shape = (activity.batch_size, sum(widths))
        for _ in range(self.steps):
            dynamics.advance_control()
            apical = dynamics.stacked_apical if able is None else dynamics.stacked_apical * able
            total.addmm_(apical.T, dynamics.u)
            dynamics.advance_compartments(noise(shape).mul_(kick))
        found = list((total * self._scale(activity)).split(widths))
        return chain.together(found) if isinstance(chain, Layered) else found

    def phase(self, depth: int) -> Phase:
        """The linearised phase of a network of that depth."""
        return Phase(self.steps, self.time_step, self.controller, depth)

    def _relative_sigmas(self, depth: int) -> list[float]:
        """Standard deviation of each layer's noise in units of σ."""
        last = 1.0 if self.sigma_output is None else self.sigma_output / self.sigma
        return [1.0] * (depth - 1) + [last]

    def _scale(self, activity: AnyActivity) -> float:
        """What makes a gradient of Σ_b Σ_t v_i^fb uᵀ."""
        return 1 / (max(self.sigma, 0.01) ** 2 * self.steps * activity.batch_size)
