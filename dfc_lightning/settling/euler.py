"""Simulation of Eq. (1) and (4) by explicit Euler steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dfc_lightning.control.chain import Activity, Chain
from dfc_lightning.control.checks import require
from dfc_lightning.control.controller import PIController
from dfc_lightning.control.plasticity import Plasticity, postsynaptic
from dfc_lightning.settling.dynamics import Dynamics, TimeStep
from dfc_lightning.settling.settled import Products, Settled, Simulation, at_rest, relative_residual

Noise = Callable[[int], Tensor]


@dataclass(frozen=True)
class Euler(Simulation):
    """Simulate ``steps`` Euler steps from the feedforward state; nothing is stored on the way.

    A sample counts as converged, as in the authors' published code, when the steady state is met to
    ``tolerance`` of the feedforward output's norm and the error has fallen to ``error_reduction`` of its first value.

    Args:
        steps: number of steps; the published ``tmax`` counts states, so its value less one.
        dt: length of a step in units of τ_u.
        tau_ratio: somatic time constant τ_v / τ_u.
        apical_tau: apical time constant τ_A / τ_u; None for an instantaneous apical compartment.
        instant_transmission: rates of this step, not of the last, reach the next layer.
        instant_system: somata follow their compartments at once.
        proactive: the apical compartments hear the control of this step, not of the last.
        sigma: standard deviation of white noise in the apical compartments.
        tolerance: see above.
        error_reduction: see above.
    """

    steps: int = 1000
    dt: float = 0.02
    tau_ratio: float = 0.2
    apical_tau: float | None = None
    instant_transmission: bool = True
    instant_system: bool = False
    proactive: bool = True
    sigma: float = 0.0
    tolerance: float = 1e-5
    error_reduction: float = 0.25

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", self.steps, "simulate at least one step")
        require(self.sigma >= 0, "sigma", self.sigma, "give a standard deviation of zero or more")
        self.time_step  # noqa: B018  checks the step against the time constants

    @property
    def time_step(self) -> TimeStep:
        """The discretisation."""
        return TimeStep(
            self.dt,
            self.tau_ratio,
            self.apical_tau,
            self.instant_transmission,
            self.instant_system,
            self.proactive,
        )

    def settle(self, chain: Chain, activity: Activity, offset: Tensor, controller: PIController) -> Settled:
        """Settle by simulation; see :class:`Settling`."""
        seed = int(torch.randint(2**62, ())) if self.sigma else 0
        noise = self._noise(seed, offset, torch.ones_like(offset[:, 0], dtype=torch.bool))
        return self._run(chain, activity, offset, controller, lambda dynamics: None, noise)

    def settle_and_integrate(
        self,
        chain: Chain,
        activity: Activity,
        offset: Tensor,
        controller: PIController,
        plasticity: Plasticity,
        drop_unconverged: bool,
    ) -> tuple[Settled, Products]:
        """Settle and average the update over the ``steps`` + 1 states, the first of which gives none."""
        seed = int(torch.randint(2**62, ())) if self.sigma else 0  # a second run must hear the same noise

        def integrate(keep: Tensor) -> tuple[Settled, Products]:
            samples, target = activity.samples(keep), offset[keep]
            posts = [torch.zeros_like(v) for v in samples.v]
            moving = [torch.zeros_like(w) for w in chain.weights[1:]]

            def add(dynamics: Dynamics) -> None:
                signals = postsynaptic(chain, samples, dynamics.trail(), plasticity)
                for post, t in zip(posts, signals):
                    post.add_(t)
                for w, t, moved in zip(moving, signals[1:], dynamics.rates):
                    w.addmm_(t.T, moved)

            settled = self._run(chain, samples, target, controller, add, self._noise(seed, offset, keep))
            # r = r⁻ + δr: what is presynaptic but does not move is multiplied once, at the end.
            mean = 1 / (self.steps + 1)
            weights, biases = chain.outer(posts, samples.presynaptic(), mean)
            for w, part in zip(weights[1:], moving):
                w.add_(part, alpha=mean)
            return settled, (weights, biases)

        settled, products = integrate(torch.ones_like(offset[:, 0], dtype=torch.bool))
        counted = settled.counted(drop_unconverged)
        if not counted.all():  # the sums above hold samples that must not count: once more without them
            products = integrate(counted)[1]
        return settled, products

    def _noise(self, seed: int, offset: Tensor, keep: Tensor) -> Noise | None:
        """Standard normal draws for the samples of the mask ``keep``, the same whichever these are."""
        if not self.sigma:
            return None
        generator = torch.Generator(offset.device).manual_seed(seed)

        def draw(width: int) -> Tensor:
            shape = (offset.shape[0], width)
            return torch.randn(shape, generator=generator, device=offset.device, dtype=offset.dtype)[keep]

        return draw

    def _run(
        self,
        chain: Chain,
        activity: Activity,
        offset: Tensor,
        controller: PIController,
        visit: Callable[[Dynamics], None],
        noise: Noise | None,
    ) -> Settled:
        dynamics = Dynamics(chain, activity, offset, controller, self.time_step)
        kick = self.sigma * self.dt**0.5 / (self.apical_tau or self.dt)
        for _ in range(self.steps):
            dynamics.advance_control()
            dynamics.advance_compartments(noise(sum(chain.widths)) * kick if noise else None)
            visit(dynamics)
        leakage = controller.steady_leakage
        converged = at_rest(
            activity, offset, dynamics.error, leakage * dynamics.u, self.tolerance, self.error_reduction
        )
        residual = relative_residual(offset, dynamics.rates[-1], dynamics.u, leakage)
        return Settled(dynamics.u, dynamics.response(), residual, converged, self.steps)
