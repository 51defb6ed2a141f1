"""Simulation of Eq. (1) and (4) by explicit Euler steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dfc_lightning.errors import require
from dfc_lightning.passes.forward_pass import ForwardPass
from dfc_lightning.passes.plasticity import Plasticity
from dfc_lightning.settling.controller import PIController
from dfc_lightning.settling.dynamics import ControlledDynamics, dynamics_of
from dfc_lightning.settling.settled import Settled, Simulation, Taught, at_rest, relative_residual
from dfc_lightning.settling.time_step import TimeStep
from dfc_lightning.settling.update_sums import update_sums

Noise = Callable[[int], Tensor]

LOOK_EVERY = 8
"""Steps from one look at whether the network still moves to the next."""


@dataclass(frozen=True)
class Euler(TimeStep, Simulation):
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
        sigma: standard deviation of white noise in the apical compartments.
        tolerance: see above.
        error_reduction: see above.
        stop_below: relative change per τ_u at which to stop, e.g. 1e-3; None to simulate all steps.
    """

    sigma: float = 0.0
    tolerance: float = 1e-5
    error_reduction: float = 0.25
    stop_below: float | None = None

    def __post_init__(self) -> None:
        Simulation.__post_init__(self)
        TimeStep.__post_init__(self)
        require(self.sigma >= 0, "sigma", self.sigma, "give a standard deviation of zero or more")
        require(
            self.stop_below is None or self.stop_below > 0,
            "stop_below",
            self.stop_below,
            "give a relative change per time above zero, e.g. 1e-3",
        )

    def settle(self, forward: ForwardPass, offset: Tensor, controller: PIController) -> Settled:
        """Settle by simulation; see :class:`Settling`."""
        return self._run(forward, offset, controller, lambda dynamics, times: None, self._noise(self._seed(), offset))

    def settle_and_integrate(
        self,
        forward: ForwardPass,
        offset: Tensor,
        controller: PIController,
        plasticity: Plasticity,
        drop_unconverged: bool,
    ) -> tuple[Settled, Taught]:
        """Settle and average the update over the ``steps`` + 1 states, the first of which gives none."""
        seed, mean = self._seed(), 1 / (self.steps + 1)
        sums = update_sums(forward, plasticity, mean)
        settled = self._run(forward, offset, controller, sums.add, self._noise(seed, offset))
        taught, counted = sums.totals(), settled.counted(drop_unconverged)
        if counted.all():
            return settled, taught
        # The sums hold samples that must not count: once more without them, and with the same noise.
        share = int(counted.sum()) / forward.batch_size
        if not share:
            return settled, [[torch.zeros_like(t) for t in each] for each in taught]
        some = forward.samples(counted)
        sums = update_sums(some, plasticity, share * mean)
        self._run(some, offset[counted], controller, sums.add, self._noise(seed, offset, counted))
        return settled, sums.totals()

    def _seed(self) -> int:
        return int(torch.randint(2**62, ())) if self.sigma else 0

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
        forward: ForwardPass,
        offset: Tensor,
        controller: PIController,
        visit: Callable[[ControlledDynamics, int], None],
        noise: Noise | None,
    ) -> Settled:
        dynamics = dynamics_of(forward, offset, controller, self)
        kick = self.sigma * self.dt**0.5 / (self.apical_tau or self.dt)
        speed, made = self.stop_below or 0.0, 0
        while made < self.steps:
            made += 1
            before = dynamics.snapshot() if speed and made % LOOK_EVERY == 0 else None
            dynamics.advance_control()
            dynamics.advance_compartments(noise(sum(forward.widths)) * kick if noise else None)
            visit(dynamics, 1)
            if before is not None and not dynamics.moves(before, speed):
                break
        if made < self.steps:
            visit(dynamics, self.steps - made)
        leakage = controller.steady_leakage
        converged = at_rest(forward, offset, dynamics.error, leakage * dynamics.u, self.tolerance, self.error_reduction)
        residual = relative_residual(offset, dynamics.rates[-1], dynamics.u, leakage)
        return Settled(dynamics.u, dynamics.response(), residual, converged, made)
