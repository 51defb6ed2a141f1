"""The steady state to first order in the target stepsize, in closed form (Lemma 1): DFC-SSA."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dfc_lightning.errors import require
from dfc_lightning.passes.forward_pass import ForwardPass
from dfc_lightning.settling.broyden import Inverse
from dfc_lightning.settling.budget import Budget
from dfc_lightning.settling.controller import PIController
from dfc_lightning.settling.equation import Equation
from dfc_lightning.settling.inverse import DENSE_UP_TO, OWN_UP_TO, cheap_inverse, own_inverse
from dfc_lightning.settling.settled import Settled, Settling, relative_residual
from dfc_lightning.settling.wide_outputs import wide_root


@dataclass(frozen=True)
class Linearized(Settling):
    """Lemma 1: u = (JQ + α̃ I)⁻¹ δ_L, and the controlled feedforward pass with that control.

    Up to ``OWN_UP_TO`` outputs by each sample's own n_L × n_L inverse; wider ones by Broyden's method from a cheaper
    one, to 2e-6 in float32 and 1e-12 in float64, and the samples that leaves by their own (up to ``DENSE_UP_TO``
    outputs).

    ``residual`` tells how far the nonlinear network then is from its own steady state; ``converged`` whether the
    linear system was solved.

    Args:
        max_iterations: limit on Broyden's iterations.
    """

    max_iterations: int = 30

    def __post_init__(self) -> None:
        require(self.max_iterations >= 1, "max_iterations", self.max_iterations, "allow at least one iteration")

    def settle(self, forward: ForwardPass, offset: Tensor, controller: PIController) -> Settled:
        """Solve the linearised steady state; see :class:`Settling`."""
        leakage, accuracy = controller.steady_leakage, 1e-12 if offset.dtype == torch.float64 else 2e-6
        if forward.outputs <= OWN_UP_TO:
            u = own_inverse(forward, leakage).step(offset)
            converged, iterations = torch.isfinite(u).all(1), 1
        else:
            u, converged, iterations = solve_linear(forward, offset, leakage, accuracy, self.max_iterations)
        response = forward.respond(forward.apical(u))
        residual = relative_residual(offset, response.output, u, leakage)
        return Settled(u, response, residual, converged, iterations)


def solve_linear(
    forward: ForwardPass,
    right: Tensor,
    leakage: float,
    accuracy: float,
    max_iterations: int,
    inverse: Inverse | None = None,
) -> tuple[Tensor, Tensor, int]:
    """(JQ + α̃ I)⁻¹ ``right`` by Broyden's method.

    Args:
        forward: the feedforward pass.
        right: right-hand sides, (B, n_L).
        leakage: α̃.
        accuracy: relative residual to reach.
        max_iterations: limit on iterations.
        inverse: where to begin; None for a cheap one. Unused where :func:`wide_root` knows a way.

    Returns:
        The solution, for which samples it was found, and the iterations made.
    """
    equation = Equation(forward, right, leakage, accuracy, max_iterations, Budget(math.inf, len(right)))
    wide = wide_root(forward, equation, linear=True)
    if wide is not None:
        return wide.u, wide.converged, wide.iterations
    root = equation.linear_root(inverse or cheap_inverse(forward, leakage))
    if forward.outputs > DENSE_UP_TO or root.converged.all():
        return root.u, root.converged, root.iterations
    late = ~root.converged
    exact = own_inverse(forward.samples(late), leakage).step(right[late])
    found = root.converged.index_put((late,), torch.isfinite(exact).all(1))
    return root.u.index_put((late,), exact), found, root.iterations
