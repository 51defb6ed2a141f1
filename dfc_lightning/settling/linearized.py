"""The steady state to first order in the target stepsize, in closed form (Lemma 1): DFC-SSA."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dfc_lightning.control.chain import Activity, Chain
from dfc_lightning.control.controller import PIController
from dfc_lightning.settling.inverse import control_inverse
from dfc_lightning.settling.root import find_root
from dfc_lightning.settling.settled import Settled, Settling, relative_residual


@dataclass(frozen=True)
class Linearized(Settling):
    """Lemma 1: u = (JQ + α̃ I)⁻¹ δ_L, and the controlled feedforward pass with that control.

    ``residual`` tells how far the nonlinear network then is from its own steady state; ``converged`` whether the
    linear system was solved.
    """

    def settle(self, chain: Chain, activity: Activity, offset: Tensor, controller: PIController) -> Settled:
        """Solve the linearised steady state; see :class:`Settling`."""
        leakage = controller.steady_leakage
        solve, exact = control_inverse(chain, activity, leakage)
        u = solve(offset)
        converged, iterations = torch.isfinite(u).all(1), 1
        if not exact:
            slopes = activity.slopes

            def linear(u: Tensor) -> Tensor:
                return offset - chain.linear_response(slopes, chain.apical(u)) - leakage * u

            accuracy = 1e-12 if offset.dtype == torch.float64 else 1e-6
            root = find_root(linear, u, solve, offset, accuracy, 60)
            u, converged, iterations = root.u, root.converged, root.iterations
        response = chain.respond(activity, chain.apical(u))
        residual = relative_residual(offset, response.rates[-1], u, leakage)
        return Settled(u, response, residual, converged, iterations)
