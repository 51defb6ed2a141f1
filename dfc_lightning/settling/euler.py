"""Simulation of Eq. (1) and (4) by explicit Euler steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dfc_lightning.control.chain import Activity, Chain, Response
from dfc_lightning.control.checks import require
from dfc_lightning.control.controller import PIController
from dfc_lightning.control.evaluator import Evaluator, ForwardPass
from dfc_lightning.control.graph import Graph
from dfc_lightning.control.plasticity import Plasticity
from dfc_lightning.control.wiring import GraphActivity
from dfc_lightning.settling.compiled import CompiledDynamics
from dfc_lightning.settling.dynamics import ControlledDynamics, Dynamics, TimeStep
from dfc_lightning.settling.graph_dynamics import GraphDynamics
from dfc_lightning.settling.settled import Settled, Simulation, Taught, at_rest, relative_residual
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
        compiled: make the steps of a chain by torch.compile, with few fused kernels: for GPUs, where the launch of many
            small ones takes the time (not measured on one yet). It compiles for some seconds at each new shape; on a
            CPU it needs a C++ compiler and is about a fifth slower.
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
    compiled: bool = False

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

    def settle(self, chain: Evaluator, activity: ForwardPass, offset: Tensor, controller: PIController) -> Settled:
        """Settle by simulation; see :class:`Settling`."""
        seed = int(torch.randint(2**62, ())) if self.sigma else 0
        return self._run(chain, activity, offset, controller, lambda dynamics, times: None, self._noise(seed, offset))

    def settle_and_integrate(
        self,
        chain: Evaluator,
        activity: ForwardPass,
        offset: Tensor,
        controller: PIController,
        plasticity: Plasticity,
        drop_unconverged: bool,
    ) -> tuple[Settled, Taught]:
        """Settle and average the update over the ``steps`` + 1 states, the first of which gives none."""
        seed = int(torch.randint(2**62, ())) if self.sigma else 0  # a second run must hear the same noise

        def integrate(keep: Tensor | None = None) -> tuple[Settled, Taught]:
            samples, target = (activity, offset) if keep is None else (activity.samples(keep), offset[keep])
            sums: _ChainSums | _UpdateSums
            if isinstance(chain, Chain) and isinstance(samples, Activity):
                sums = _ChainSums(chain, samples, plasticity, 1 / (self.steps + 1))
            else:
                sums = _UpdateSums(chain, samples, plasticity, 1 / (self.steps + 1))
            settled = self._run(chain, samples, target, controller, sums.add, self._noise(seed, offset, keep))
            return settled, sums.totals()

        settled, taught = integrate()
        counted = settled.counted(drop_unconverged)
        if not counted.all():  # the sums above hold samples that must not count: once more without them
            taught = integrate(counted)[1]
        return settled, taught

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

    def _dynamics(
        self, chain: Evaluator, activity: ForwardPass, offset: Tensor, controller: PIController
    ) -> ControlledDynamics:
        if isinstance(chain, Chain):
            assert isinstance(activity, Activity)
            kind = CompiledDynamics if self.compiled else Dynamics
            return kind(chain, activity, offset, controller, self.time_step)
        assert isinstance(chain, Graph) and isinstance(activity, GraphActivity)
        return GraphDynamics(chain, activity, offset, controller, self.time_step)

    def _run(
        self,
        chain: Evaluator,
        activity: ForwardPass,
        offset: Tensor,
        controller: PIController,
        visit: Callable[[ControlledDynamics, int], None],
        noise: Noise | None,
    ) -> Settled:
        dynamics = self._dynamics(chain, activity, offset, controller)
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


class _ChainSums:
    """The mean update of a chain over time: what is presynaptic but does not move is multiplied once, at the end."""

    def __init__(self, chain: Chain, activity: Activity, plasticity: Plasticity, mean: float) -> None:
        self.chain, self.activity, self.plasticity, self.mean = chain, activity, plasticity, mean
        self._posts = [torch.zeros_like(v) for v in activity.v]
        self._moving = ProductSums(activity.v[1:], activity.v[:-1])

    def add(self, dynamics: ControlledDynamics, times: int) -> None:
        """Count the present state in, so many times."""
        trail = dynamics.trail(driven=self.plasticity != "rate_difference")
        assert isinstance(trail, Response)
        signals = self.chain.postsynaptic(self.activity, trail, self.plasticity)
        for post, t in zip(self._posts, signals):
            post.add_(t, alpha=times)
        self._moving.add(signals[1:], dynamics.rates[:-1], times)

    def totals(self) -> Taught:
        """The mean."""
        taught = self.chain.update(self.activity, self._posts, self.activity.presynaptic(), self.mean)
        for (weight, _), part in zip(taught[1:], self._moving.totals()):
            weight.add_(part, alpha=self.mean)
        return taught


class _UpdateSums:
    """The mean update of any network over time, formed in every state."""

    def __init__(self, chain: Evaluator, activity: ForwardPass, plasticity: Plasticity, mean: float) -> None:
        self.chain, self.activity, self.plasticity, self.mean = chain, activity, plasticity, mean
        self._totals: Taught = []

    def add(self, dynamics: ControlledDynamics, times: int) -> None:
        """Count the present state in, so many times."""
        state = dynamics.trail()
        signals = self.chain.postsynaptic(self.activity, state, self.plasticity)
        heard = self.chain.presynaptic(self.activity, state)
        taught = self.chain.update(self.activity, signals, heard, self.mean * times)
        for totals, parts in zip(self._totals, taught):
            for total, part in zip(totals, parts):
                total.add_(part)
        self._totals = self._totals or taught

    def totals(self) -> Taught:
        """The mean."""
        return self._totals
