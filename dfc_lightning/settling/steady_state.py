"""The steady state itself, solved: F(u) = δ_L − δr_L(u) − α̃ u = 0, one root of size n_L a sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dfc_lightning.control.chain import Activity, Chain, Response
from dfc_lightning.control.checks import require
from dfc_lightning.control.controller import PIController
from dfc_lightning.settling.inverse import EXACT_UP_TO, control_inverse
from dfc_lightning.settling.root import find_root
from dfc_lightning.settling.settled import Settled, Settling, relative_residual


@dataclass(frozen=True)
class SteadyState(Settling):
    """Solve for the steady state instead of simulating the way to it.

    Broyden's method on each sample, from Lemma 1 and its inverse (outputs wider than ``EXACT_UP_TO``: from the
    batch-mean inverse). Samples it leaves unsettled get Newton steps with backtracking, their own Jacobians taken
    where they stand; where outputs are too wide for that, they stay as they are. The residual of every sample is
    reported. A root is found whether or not the dynamics would reach it: stability (Condition 3) is not looked at.

    Args:
        rtol: relative residual ‖F(u)‖ / ‖δ_L‖ to reach.
        max_iterations: limit on Broyden's and again on Newton's iterations.
    """

    rtol: float = 1e-5
    max_iterations: int = 20

    def __post_init__(self) -> None:
        require(self.rtol > 0, "rtol", self.rtol, "give a relative residual above zero, e.g. 1e-5")
        require(self.max_iterations >= 1, "max_iterations", self.max_iterations, "allow at least one iteration")

    def settle(self, chain: Chain, activity: Activity, offset: Tensor, controller: PIController) -> Settled:
        """Solve the steady state; see :class:`Settling`."""
        leakage = controller.steady_leakage
        latest: list[tuple[Tensor, Response]] = []

        def missing(u: Tensor) -> Tensor:
            response = chain.respond(activity, chain.apical(u))
            latest[:] = [(u, response)]
            return offset - response.rates[-1] - leakage * u

        solve, _ = control_inverse(chain, activity, leakage)
        root = find_root(missing, solve(offset), solve, offset, self.rtol, self.max_iterations)
        u, iterations = root.u, root.iterations
        if chain.widths[-1] <= EXACT_UP_TO and not root.converged.all():
            late = ~root.converged
            u = u.clone()
            u[late], more = self._newton(chain, activity.samples(late), offset[late], u[late], leakage)
            iterations += more
        # The last pass evaluated is the settled one unless some sample was taken back to an earlier point.
        at, response = latest[0]
        if not torch.equal(at, u):
            response = chain.respond(activity, chain.apical(u))
        residual = relative_residual(offset, response.rates[-1], u, leakage)
        return Settled(u, response, residual, residual <= self.rtol, iterations)

    def _newton(
        self, chain: Chain, activity: Activity, offset: Tensor, u: Tensor, leakage: float
    ) -> tuple[Tensor, int]:
        """Newton steps, each sample's halved until its residual falls."""

        def evaluate(u: Tensor) -> tuple[Tensor, Response, Tensor]:
            response = chain.respond(activity, chain.apical(u))
            value = offset - response.rates[-1] - leakage * u
            return value, response, relative_residual(offset, response.rates[-1], u, leakage)

        value, response, residual = evaluate(u)
        iterations = 0
        for iterations in range(1, self.max_iterations + 1):
            gain = chain.output_gain(_slopes_at(chain, activity, response))
            gain.diagonal(dim1=1, dim2=2).add_(leakage)
            step = torch.linalg.solve_ex(gain, value.unsqueeze(2))[0].squeeze(2)
            step = torch.where(torch.isfinite(step).all(1, keepdim=True), step, torch.zeros_like(step))
            moving = residual > self.rtol
            for _ in range(12):
                trial = u + torch.where(moving.unsqueeze(1), step, torch.zeros_like(step))
                trial_residual = evaluate(trial)[2]
                better = moving & (trial_residual < residual)
                u = torch.where(better.unsqueeze(1), trial, u)
                moving = moving & ~better
                if not moving.any():
                    break
                step = 0.5 * step
            before = residual
            value, response, residual = evaluate(u)
            if not ((residual > self.rtol) & (residual < before)).any():
                break
        return u, iterations


def _slopes_at(chain: Chain, activity: Activity, response: Response) -> list[Tensor]:
    """φ' at the controlled voltages."""
    slopes = []
    for phi, v, basal, driven in zip(chain.nonlinearities, activity.v, response.basal, response.driven):
        at = v + basal + driven
        slopes.append(phi.slope(at, phi(at)))
    return slopes
