"""Simulation under strong feedback and noise: forward and feedback weights are taught by one run (Strong-DFC).

The apical compartments hold v_i^fb = Q_i u + noise. White noise, of the standard deviation σ, goes through their own
time constant, as in Meulemans et al. 2021; coloured noise is n ← (1 − dt/τ_ε) n + (√dt/τ_ε) ξ, and σ n is added to
them, as in Meulemans et al. 2022.
"""

# Annotations are not postponed here: jsonargparse would look them up in the modules of the subclasses.

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from dfc_lightning.errors import require
from dfc_lightning.losses.link import Link
from dfc_lightning.passes.forward_pass import ForwardPass
from dfc_lightning.passes.plasticity import Plasticity
from dfc_lightning.settling.controller import PIController
from dfc_lightning.settling.dynamics import stacked_noise
from dfc_lightning.settling.settled import Settled, Settling, Taught, share_missed
from dfc_lightning.settling.strong_dynamics import StrongDynamics, strong_dynamics
from dfc_lightning.settling.time_step import TimeStep

Draw: TypeAlias = Callable[[], Tensor]
"""Standard normal draws for one step, (B, Σ n_i)."""

LEAST_SIGMA = 0.01
"""The standard deviation by whose square the gradient of feedback weights is divided at least."""


def draws(forward: ForwardPass, like: Tensor, keep: Tensor | None = None) -> Draw:
    """The noise that is the batch's own, the same from the beginning at each call.

    Args:
        forward: the pass of all samples.
        like: in whose dtype.
        keep: which samples draws are for, (B,) bool, each given those that it has among all; None for all.
    """
    drawing, shape = forward.chance.drawing(), (forward.batch_size, sum(forward.widths))

    def draw() -> Tensor:
        drawn = drawing.of_samples(shape)
        return (drawn if keep is None else drawn[keep]).to(like.dtype)

    return draw


class Run(NamedTuple):
    """What a simulation came to.

    Args:
        settled: the network at the end.
        taught: the mean over time and batch of the parameters' changes, where asked for.
        feedback: the mean over time and batch of what Q_i of each point is to descend, (n_i, n_L), where asked for.
    """

    settled: Settled
    taught: Taught | None
    feedback: list[Tensor] | None


@dataclass(frozen=True)
class StrongSimulation(Settling):
    """Simulate ``steps`` Euler steps from the feedforward state towards the label; nothing is stored on the way.

    Transmission between layers is instantaneous. The authors stop long before the steady state, after half of τ_u: a
    sample counts as converged here if it ends nearer to its steady state, e = α̃ u, than without control.

    Args:
        steps: T, the number of steps; the published ``tmax`` counts states, so its value less one.
        dt: length of a step in units of the controller's time constant τ_u.
        tau_ratio: somatic time constant τ_v / τ_u, at least ``dt``.
        apical_tau: apical time constant τ_A / τ_u, at least ``dt``; None for an instantaneous apical compartment.
        proactive: the apical compartments hear the control of this step, not of the last.
        sigma: standard deviation of the noise in hidden layers; 0 for none anywhere.
        sigma_output: that in the output layer; None for the same.
        tau_noise: time constant τ_ε / τ_u of coloured noise, at least ``dt``; None for white noise.
    """

    steps: int = 499
    dt: float = 1e-3
    tau_ratio: float = 0.01
    apical_tau: float | None = None
    proactive: bool = True
    sigma: float = 0.0
    sigma_output: float | None = None
    tau_noise: float | None = None

    def __post_init__(self) -> None:
        require(self.steps >= 2, "steps", self.steps, "simulate two steps or more")
        self.time_step  # noqa: B018  checks its arguments
        require(self.sigma >= 0, "sigma", self.sigma, "give a standard deviation of zero or more")
        remedy = "give a standard deviation of zero or more, and sigma above zero with it"
        sound = self.sigma_output is None or (self.sigma_output >= 0 and (self.sigma > 0 or self.sigma_output == 0))
        require(sound, "sigma_output", self.sigma_output, remedy)
        remedy = f"the step dt={self.dt} is larger than this time constant; lower dt or raise it"
        require(self.tau_noise is None or self.dt <= self.tau_noise, "tau_noise", self.tau_noise, remedy)

    @property
    def time_step(self) -> TimeStep:
        """The discretisation."""
        return TimeStep(self.dt, self.tau_ratio, self.apical_tau, proactive=self.proactive)

    def settle(self, forward: ForwardPass, offset: Tensor, controller: PIController) -> Settled:
        """Simulate towards r_L* itself, g being the identity; see :class:`Settling`."""
        return self.run(forward, offset, "identity", controller, draws(forward, offset)).settled

    def run(
        self,
        forward: ForwardPass,
        offset: Tensor,
        link: Link,
        controller: PIController,
        draw: Draw | None = None,
        update: Plasticity | None = None,
        filtered: float | None = None,
        layer_gain: float | None = None,
        weight: Tensor | None = None,
        visit: Callable[[StrongDynamics], None] = lambda dynamics: None,
    ) -> Run:
        """Simulate.

        Args:
            forward: the feedforward pass, bound to the feedback weights Q_i.
            offset: e at the start, y − g(r_L⁻), (B, n_L).
            link: g.
            controller: the controller.
            draw: source of the noise; None for none.
            update: the postsynaptic factor, to average the update over time; None not to.
            filtered: to teach feedback weights, from the control less its low-passed self: the share dt / τ_f of the
                way to the control that this goes in a step, 0 for the control itself. None not to.
            layer_gain: what stands for 1 + τ_v/τ_ε in the gradient of feedback weights; None for that.
            weight: what each sample counts for in the update, (B, 1); None for 1.
            visit: called after each step.
        """
        plasticity = update or "rate_difference"
        dynamics = strong_dynamics(forward, offset, link, controller, self.time_step, plasticity, weight)
        noise = None if draw is None or not self.sigma else self._noise(forward, offset, draw)
        products = offset.new_zeros(forward.outputs, sum(forward.widths))  # long rows are summed faster
        slow, fast = torch.zeros_like(offset), torch.empty_like(offset)
        for step in range(self.steps):
            dynamics.advance_control()
            if filtered is not None:
                slow.lerp_(dynamics.u, filtered if step else float(filtered > 0))  # it starts at the first control
                products.addmm_(torch.sub(dynamics.u, slow, out=fast).T, dynamics.stacked_apical)
            dynamics.advance_compartments(noise() if noise else None)
            if update is not None:
                dynamics.count()
            visit(dynamics)
        settled = self._settled(offset, controller, dynamics)
        mean = 1 / (self.steps + 1)
        return Run(
            settled,
            None if update is None else [[t.mul_(mean) for t in each] for each in dynamics.sums()],
            None if filtered is None else self._feedback_gradients(forward, products.T.contiguous(), layer_gain),
        )

    def _sigmas(self, forward: ForwardPass) -> list[float]:
        hidden, output = self.sigma, self.sigma if self.sigma_output is None else self.sigma_output
        return [output if i in forward.outputs_at else hidden for i in range(forward.depth)]

    def _feedback_gradients(self, forward: ForwardPass, products: Tensor, layer_gain: float | None) -> list[Tensor]:
        """(1 + τ_v/τ_ε)^{L−i} / σ_i² times the mean of v_i^fb ũᵀ; there are as many somata after a point as L − i."""
        if layer_gain is None:  # by how much a soma damps coloured noise
            layer_gain = 1.0 if self.tau_noise is None else 1 + self.tau_ratio / self.tau_noise
        mean = 1 / (self.steps * forward.batch_size)
        scales = [
            mean * layer_gain ** (somata - 1) / max(sigma, LEAST_SIGMA) ** 2
            for somata, sigma in zip(forward.somata, self._sigmas(forward))
        ]
        return [each * scale for each, scale in zip(products.split(list(forward.widths)), scales)]

    def _noise(self, forward: ForwardPass, like: Tensor, draw: Draw) -> Draw:
        """What is added to the apical voltages at each step."""
        sigmas = self._sigmas(forward)
        if self.tau_noise is None:
            kick = stacked_noise(sigmas, forward.widths, like) * (self.dt**0.5 / (self.apical_tau or self.dt))
            return lambda: draw().mul_(kick)
        kick = stacked_noise(sigmas, forward.widths, like) * (self.dt**0.5 / self.tau_noise)
        held, left = like.new_zeros(len(like), sum(forward.widths)), 1 - self.dt / self.tau_noise
        return lambda: held.mul_(left).addcmul_(draw(), kick)

    def _settled(self, offset: Tensor, controller: PIController, dynamics: StrongDynamics) -> Settled:
        residual = share_missed(dynamics.error - controller.steady_leakage * dynamics.u, offset)
        return Settled(dynamics.u, dynamics.response(), residual, residual <= 1, self.steps)
