"""The steady state itself, solved: F(u) = δ_L − δr_L(u) − α̃ u = 0, one root of size n_L a sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dfc_lightning.control.chain import Activity, Chain
from dfc_lightning.control.checks import require
from dfc_lightning.control.controller import PIController
from dfc_lightning.control.evaluator import Deviation, Evaluator, ForwardPass
from dfc_lightning.settling.inverse import DENSE_UP_TO, OWN_UP_TO, cheap_inverse, own_inverse
from dfc_lightning.settling.narrow import narrow_root
from dfc_lightning.settling.root import Inverse, find_root
from dfc_lightning.settling.settled import Settled, Settling, relative_residual


@dataclass(frozen=True)
class SteadyState(Settling):
    """Solve for the steady state instead of simulating the way to it.

    Broyden's method on each sample, from the linearised solution and its inverse: each sample's own up to ``OWN_UP_TO``
    outputs, a cheaper one beyond. Samples it leaves unsettled try their own inverse, then follow the slow
    controller's way from u = 0 in linearly implicit steps; where outputs are wider than ``DENSE_UP_TO``, they stay as
    they are. Outputs that wide after a narrower layer, with Q_L = I, are solved in that layer's rates. The residual of
    every sample is reported. Broyden's root is taken whether or not the dynamics would reach it: stability (Condition
    3) is not looked at.

    On a GPU the host looks at data every fourth iteration and twice in the end, as long as all samples settle.

    Args:
        rtol: relative residual ‖F(u)‖ / ‖δ_L‖ to reach; None for 1e-5 in float32 and 1e-11 in float64.
        max_iterations: limit on Broyden's iterations; five times as many implicit steps may follow.
    """

    rtol: float | None = None
    max_iterations: int = 30

    def __post_init__(self) -> None:
        require(self.rtol is None or self.rtol > 0, "rtol", self.rtol, "give a residual above zero, e.g. 1e-5")
        require(self.max_iterations >= 1, "max_iterations", self.max_iterations, "allow at least one iteration")

    def accuracy(self, dtype: torch.dtype) -> float:
        """The relative residual to reach in a dtype."""
        if self.rtol is not None:
            return self.rtol
        return 1e-11 if dtype == torch.float64 else 1e-5

    def settle(self, chain: Evaluator, activity: ForwardPass, offset: Tensor, controller: PIController) -> Settled:
        """Solve the steady state; see :class:`Settling`."""
        return self.solve(chain, activity, offset, controller)[0]

    def solve(
        self, chain: Evaluator, activity: ForwardPass, offset: Tensor, controller: PIController
    ) -> tuple[Settled, Inverse | None]:
        """The settled network and, where it was used, the inverse of JQ + α̃ I as the iterations have left it."""
        leakage, rtol = controller.steady_leakage, self.accuracy(offset.dtype)
        latest: list[tuple[Tensor, Deviation]] = []

        def missing(u: Tensor) -> Tensor:
            response = chain.respond(activity, chain.apical(u))
            latest[:] = [(u, response)]
            return offset - response.output - leakage * u

        if (
            offset.shape[1] > DENSE_UP_TO
            and isinstance(chain, Chain)
            and isinstance(activity, Activity)
            and chain.reducible
        ):
            root, last = narrow_root(chain, activity, offset, leakage, rtol, self.max_iterations)
            return self._settled(chain, activity, offset, root.u, leakage, root.iterations, last), None
        dense, own = offset.shape[1] <= DENSE_UP_TO, offset.shape[1] <= OWN_UP_TO
        inverse = (own_inverse if own else cheap_inverse)(chain, activity, leakage)
        root = find_root(missing, inverse.step(offset), inverse, offset, rtol, self.max_iterations)
        u, iterations = root.u, root.iterations
        if dense and not root.converged.all():
            late = ~root.converged
            found, more = self._finish(chain, activity.samples(late), offset[late], u[late], leakage, own)
            u, iterations = u.index_put((late,), found), iterations + more
        # The last pass evaluated is the settled one unless some sample was taken back to an earlier point.
        at, response = latest[0]
        settled = self._settled(
            chain, activity, offset, u, leakage, iterations, response if torch.equal(at, u) else None
        )
        return settled, inverse

    def _settled(
        self,
        chain: Evaluator,
        activity: ForwardPass,
        offset: Tensor,
        u: Tensor,
        leakage: float,
        iterations: int,
        response: Deviation | None = None,
    ) -> Settled:
        response = response or chain.respond(activity, chain.apical(u))
        residual = relative_residual(offset, response.output, u, leakage)
        return Settled(u, response, residual, residual <= self.accuracy(offset.dtype), iterations)

    def _finish(
        self, chain: Evaluator, activity: ForwardPass, offset: Tensor, best: Tensor, leakage: float, tried_own: bool
    ) -> tuple[Tensor, int]:
        """What else there is for the few samples that are left: their own inverses, then continuation."""

        def missing(u: Tensor) -> Tensor:
            return offset - chain.respond(activity, chain.apical(u)).output - leakage * u

        iterations = 0
        if not tried_own:
            inverse = own_inverse(chain, activity, leakage)
            root = find_root(
                missing, inverse.step(offset), inverse, offset, self.accuracy(offset.dtype), self.max_iterations
            )
            nearer = torch.linalg.vector_norm(missing(root.u), dim=1) < torch.linalg.vector_norm(missing(best), dim=1)
            best, iterations = torch.where(nearer.unsqueeze(1), root.u, best), root.iterations
            if root.converged.all():
                return best, iterations
        best, more = self._continue(chain, activity, offset, best, leakage)
        return best, iterations + more

    def _continue(
        self, chain: Evaluator, activity: ForwardPass, offset: Tensor, best: Tensor, leakage: float
    ) -> tuple[Tensor, int]:
        """Pseudo-transient continuation: linearly implicit steps of du/dt = F(u) from u = 0.

        It goes the way the controller goes when it is much slower than the network, in steps h that grow as long as
        the linearisation foretells the outcome, and end as Newton's.
        """

        def evaluate(u: Tensor) -> tuple[Tensor, Deviation]:
            response = chain.respond(activity, chain.apical(u))
            return offset - response.output - leakage * u, response

        def norm(value: Tensor) -> Tensor:
            return torch.linalg.vector_norm(value, dim=1, keepdim=True)

        u = torch.zeros_like(best)
        value, response = evaluate(u)
        size = norm(offset)
        best_norm = norm(evaluate(best)[0])
        rate: Tensor | None = None  # 1 / h
        iterations = 0
        while iterations < 5 * self.max_iterations:
            iterations += 1
            gain = chain.output_gain(activity, response)
            gain.diagonal(dim1=1, dim2=2).add_(leakage)
            if rate is None:
                rate = torch.linalg.matrix_norm(gain).unsqueeze(1)
            gain.diagonal(dim1=1, dim2=2).add_(rate)
            step = torch.linalg.solve_ex(gain, value.unsqueeze(2))[0].squeeze(2)
            moving = norm(value) > self.accuracy(offset.dtype) * size
            trial = torch.where(moving & torch.isfinite(step).all(1, keepdim=True), u + step, u)
            trial_value, trial_response = evaluate(trial)
            surprise = norm(trial_value - rate * step) / norm(value)
            forward = (step * value).sum(1, keepdim=True) > 0
            accept = (surprise < 0.5) & forward & moving
            u = torch.where(accept, trial, u)
            value = torch.where(accept, trial_value, value)
            response = trial_response.where(accept.squeeze(1), response)
            rate = torch.where(accept, rate * torch.where(surprise < 0.1, 0.1, 0.3).to(rate), rate * 4)
            better = norm(value) < best_norm
            best, best_norm = torch.where(better, u, best), torch.where(better, norm(value), best_norm)
            if not moving.any():
                break
        return best, iterations
