"""The steady state to first order in the target stepsize, in closed form (Lemma 1): DFC-SSA."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dfc_lightning.control.chain import Activity, Chain
from dfc_lightning.control.checks import require
from dfc_lightning.control.controller import PIController
from dfc_lightning.control.evaluator import Evaluator, ForwardPass
from dfc_lightning.settling.inverse import DENSE_UP_TO, OWN_UP_TO, mean_field_inverse, own_inverse
from dfc_lightning.settling.narrow import narrow_root
from dfc_lightning.settling.root import find_root
from dfc_lightning.settling.settled import Settled, Settling, relative_residual


@dataclass(frozen=True)
class Linearized(Settling):
    """Lemma 1: u = (JQ + α̃ I)⁻¹ δ_L, and the controlled feedforward pass with that control.

    Up to ``OWN_UP_TO`` outputs by each sample's own n_L × n_L inverse; wider ones by Broyden's method from the
    batch-mean one, to 1e-6 in float32 and 1e-12 in float64, and the samples that leaves by their own (up to
    ``DENSE_UP_TO`` outputs).

    ``residual`` tells how far the nonlinear network then is from its own steady state; ``converged`` whether the
    linear system was solved.

    Args:
        max_iterations: limit on Broyden's iterations.
    """

    max_iterations: int = 30

    def __post_init__(self) -> None:
        require(self.max_iterations >= 1, "max_iterations", self.max_iterations, "allow at least one iteration")

    def settle(self, chain: Evaluator, activity: ForwardPass, offset: Tensor, controller: PIController) -> Settled:
        """Solve the linearised steady state; see :class:`Settling`."""
        leakage = controller.steady_leakage
        if offset.shape[1] <= OWN_UP_TO:
            u = own_inverse(chain, activity, leakage).step(offset)
            converged, iterations = torch.isfinite(u).all(1), 1
        else:
            u, converged, iterations = self._iterate(chain, activity, offset, leakage)
        response = chain.respond(activity, chain.apical(u))
        residual = relative_residual(offset, response.output, u, leakage)
        return Settled(u, response, residual, converged, iterations)

    def _iterate(
        self, chain: Evaluator, activity: ForwardPass, offset: Tensor, leakage: float
    ) -> tuple[Tensor, Tensor, int]:
        def missing(u: Tensor) -> Tensor:
            return offset - chain.linear_response(activity, chain.apical(u)) - leakage * u

        accuracy = 1e-12 if offset.dtype == torch.float64 else 1e-6
        if (
            offset.shape[1] > DENSE_UP_TO
            and isinstance(chain, Chain)
            and isinstance(activity, Activity)
            and chain.reducible
        ):
            root = narrow_root(chain, activity, offset, leakage, accuracy, self.max_iterations, linear=True)
            return root.u, root.converged, root.iterations
        inverse = mean_field_inverse(chain, activity, leakage)
        root = find_root(missing, inverse.step(offset), inverse, offset, accuracy, self.max_iterations)
        u, late = root.u, ~root.converged
        if offset.shape[1] <= DENSE_UP_TO and not root.converged.all():
            exact = own_inverse(chain, activity.samples(late), leakage).step(offset[late])
            u = u.index_put((late,), exact)
            return u, root.converged.index_put((late,), torch.isfinite(exact).all(1)), root.iterations
        return u, root.converged, root.iterations
