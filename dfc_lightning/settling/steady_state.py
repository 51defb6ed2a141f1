"""The steady state itself, solved: F(u) = δ_L − δr_L(u) − α̃ u = 0, one root of size n_L a sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dfc_lightning.errors import require
from dfc_lightning.passes.forward_pass import Deviation, ForwardPass
from dfc_lightning.settling.broyden import Inverse, Root
from dfc_lightning.settling.budget import Budget
from dfc_lightning.settling.continuation import continued_root
from dfc_lightning.settling.controller import PIController
from dfc_lightning.settling.equation import Equation
from dfc_lightning.settling.inverse import DENSE_UP_TO, OWN_UP_TO, first_inverse, own_inverse
from dfc_lightning.settling.layered import layered_root
from dfc_lightning.settling.settled import Settled, Settling, relative_residual
from dfc_lightning.settling.wide_outputs import wide_root

LEAST_STEPS = 6
"""Steps of a fallback that must be affordable, for it to be begun with."""


@dataclass(frozen=True)
class SteadyState(Settling):
    """Solve for the steady state instead of simulating the way to it.

    Broyden's method on each sample, from the linearised solution and its inverse: each sample's own up to ``OWN_UP_TO``
    outputs, a cheaper one beyond. Samples it leaves unsettled try their own inverse, then follow the slow
    controller's way from u = 0 in linearly implicit steps. Where outputs are wider than ``DENSE_UP_TO`` they stay as
    they are, and so do samples that ``max_passes`` does not do for. Outputs that wide after a narrower layer, with
    Q_L = I, are solved in that layer's rates. The residual of every sample is reported. Broyden's root is taken whether
    or not the dynamics would reach it: stability (Condition 3) is not looked at.

    On a GPU the host looks at data every fourth iteration and twice in the end, as long as all samples settle.

    Args:
        rtol: relative residual ‖F(u)‖ / ‖δ_L‖ to reach; None for 1e-5 in float32 and 1e-11 in float64.
        max_iterations: limit on Broyden's iterations; five times as many implicit steps may follow.
        max_passes: limit on what follows the linearised solution, in forward passes of the batch: one an iteration;
            n_L for a gain, whose rows are pulled back through the network, and one more for an implicit step; of some
            samples only, by their share of the batch.
    """

    rtol: float | None = None
    max_iterations: int = 30
    max_passes: float = 100.0

    def __post_init__(self) -> None:
        require(self.rtol is None or self.rtol > 0, "rtol", self.rtol, "give a residual above zero, e.g. 1e-5")
        require(self.max_iterations >= 1, "max_iterations", self.max_iterations, "allow at least one iteration")
        require(self.max_passes >= 1, "max_passes", self.max_passes, "allow one forward pass or more, e.g. 100")

    def accuracy(self, dtype: torch.dtype) -> float:
        """The relative residual to reach in a dtype."""
        if self.rtol is not None:
            return self.rtol
        return 1e-11 if dtype == torch.float64 else 1e-5

    def settle(self, forward: ForwardPass, offset: Tensor, controller: PIController) -> Settled:
        """Solve the steady state; see :class:`Settling`."""
        return self.solve(forward, offset, controller)[0]

    def solve(self, forward: ForwardPass, offset: Tensor, controller: PIController) -> tuple[Settled, Inverse | None]:
        """The settled network and, where it was used, the inverse of JQ + α̃ I as the iterations have left it."""
        leakage, accuracy = controller.steady_leakage, self.accuracy(offset.dtype)
        budget = Budget(self.max_passes, len(offset))
        equation = Equation(forward, offset, leakage, accuracy, self.max_iterations, budget)
        inverse: Inverse | None = None
        if forward.layered:
            root = _with_fallbacks(equation, layered_root(equation))
        elif (wide := wide_root(forward, equation)) is not None:
            root = wide
        else:
            inverse = first_inverse(forward, leakage)
            root = _with_fallbacks(equation, equation.root(inverse))
        response = root.aux or equation(root.u)[1]
        residual = relative_residual(offset, response.output, root.u, leakage)
        return Settled(root.u, response, residual, residual <= accuracy, root.iterations), inverse


class Fallback(NamedTuple):
    """Another way for samples that are late.

    Args:
        run: the way.
        passes: what it costs a sample at least, to be of any use.
    """

    run: Callable[[Equation], Root[Deviation]]
    passes: int


def _with_fallbacks(equation: Equation, root: Root[Deviation]) -> Root[Deviation]:
    """The root with what samples it has not converged in tried once more, by one way after the other.

    Where the budget does not do for all of them, the nearest are tried.
    """
    for fallback in _fallbacks(equation.forward):
        if root.converged.all():
            break
        room = equation.budget.room(fallback.passes)
        if not room:
            continue
        some = root.residual.masked_fill(root.converged, torch.inf).argsort()[:room]
        late = torch.zeros_like(root.converged).index_fill(0, some, True) & ~root.converged
        root = root.improved(late, fallback.run(equation.samples(late)))
    return root


def _fallbacks(forward: ForwardPass) -> Sequence[Fallback]:
    outputs = forward.outputs
    if outputs > DENSE_UP_TO:
        return []
    continuation = Fallback(continued_root, 1 + LEAST_STEPS * (outputs + 1))
    if outputs > OWN_UP_TO or forward.layered:
        return [Fallback(_root_from_own_inverse, outputs + LEAST_STEPS), continuation]
    return [continuation]  # the own inverse is what was tried first


def _root_from_own_inverse(equation: Equation) -> Root[Deviation]:
    equation.spend(equation.forward.outputs)
    return equation.root(own_inverse(equation.forward, equation.leakage))
