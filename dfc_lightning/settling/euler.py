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
from dfc_lightning.settling.time_sum import ProductSums

Noise = Callable[[int], Tensor]

LOOK_EVERY = 8
"""Steps from one look at whether the network still moves to the next."""


@dataclass(frozen=True)
class Euler(Simulation):
    """Simulate ``steps`` Euler steps from the feedforward state; nothing is stored on the way.

    A sample counts as converged, as in the authors' published code, when the steady state is met to
    ``tolerance`` of the feedforward output's norm and the error has fallen to ``error_reduction`` of its first value.

    With ``stop_below`` the simulation ends early, once nothing moves in any sample: control, apical and somatic
    voltages each change by less than that share of their norm per τ_u. The time average is then completed as if the
    steps left out had repeated the last state, so that it is over ``steps`` + 1 states all the same. What is left of
    the way is of the order of ``stop_below`` times the slowest time constant of the loop.

    On a GPU the host looks at data every eighth step for the sums of ``settle_and_integrate`` if layers are wide, every
    eighth for ``stop_below``, and once in the end.

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
        stop_below: relative change per τ_u at which to stop, e.g. 1e-3; None to simulate all steps.
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
    stop_below: float | None = None

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", self.steps, "simulate at least one step")
        require(self.sigma >= 0, "sigma", self.sigma, "give a standard deviation of zero or more")
        require(
            self.stop_below is None or self.stop_below > 0,
            "stop_below",
            self.stop_below,
            "give a relative change per time above zero, e.g. 1e-3",
        )
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
        return self._run(chain, activity, offset, controller, lambda dynamics, times: None, self._noise(seed, offset))

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

        def integrate(keep: Tensor | None = None) -> tuple[Settled, Products]:
            samples, target = (activity, offset) if keep is None else (activity.samples(keep), offset[keep])
            posts = [torch.zeros_like(v) for v in samples.v]
            moving = ProductSums(samples.v[1:], samples.v[:-1])
            driven = plasticity != "rate_difference"

            def add(dynamics: Dynamics, times: int) -> None:
                signals = postsynaptic(chain, samples, dynamics.trail(driven), plasticity)
                for post, t in zip(posts, signals):
                    post.add_(t, alpha=times)
                moving.add(signals[1:], dynamics.rates[:-1], times)

            settled = self._run(chain, samples, target, controller, add, self._noise(seed, offset, keep))
            # r = r⁻ + δr: what is presynaptic but does not move is multiplied once, at the end.
            mean = 1 / (self.steps + 1)
            weights, biases = chain.outer(posts, samples.presynaptic(), mean)
            for w, part in zip(weights[1:], moving.totals()):
                w.add_(part, alpha=mean)
            return settled, (weights, biases)

        settled, products = integrate()
        counted = settled.counted(drop_unconverged)
        if not counted.all():  # the sums above hold samples that must not count: once more without them
            products = integrate(counted)[1]
        return settled, products

    def _noise(self, seed: int, offset: Tensor, keep: Tensor | None = None) -> Noise | None:
        """Standard normal draws for all samples or those of the mask ``keep``, the same whichever these are."""
        if not self.sigma:
            return None
        generator = torch.Generator(offset.device).manual_seed(seed)

        def draw(width: int) -> Tensor:
            shape = (offset.shape[0], width)
            drawn = torch.randn(shape, generator=generator, device=offset.device, dtype=offset.dtype)
            return drawn if keep is None else drawn[keep]

        return draw

    def _run(
        self,
        chain: Chain,
        activity: Activity,
        offset: Tensor,
        controller: PIController,
        visit: Callable[[Dynamics, int], None],
        noise: Noise | None,
    ) -> Settled:
        dynamics = Dynamics(chain, activity, offset, controller, self.time_step)
        kick = self.sigma * self.dt**0.5 / (self.apical_tau or self.dt)
        speed, made = self.stop_below or 0.0, 0
        while made < self.steps:
            made += 1
            before = dynamics.snapshot() if speed and made % LOOK_EVERY == 0 else None
            dynamics.advance_control()
            dynamics.advance_compartments(noise(sum(chain.widths)) * kick if noise else None)
            visit(dynamics, 1)
            if before is not None and not dynamics.moves(before, speed):
                break
        if made < self.steps:
            visit(dynamics, self.steps - made)
        leakage = controller.steady_leakage
        converged = at_rest(
            activity, offset, dynamics.error, leakage * dynamics.u, self.tolerance, self.error_reduction
        )
        residual = relative_residual(offset, dynamics.rates[-1], dynamics.u, leakage)
        return Settled(dynamics.u, dynamics.response(), residual, converged, made)
