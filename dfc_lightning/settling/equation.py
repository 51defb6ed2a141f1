"""What is to be solved for the steady state: F(u) = δ_L − δr_L(u) − α̃ u = 0, one root of size n_L a sample."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dfc_lightning.passes.forward_pass import Deviation, ForwardPass
from dfc_lightning.settling.broyden import Inverse, Root, find_root


@dataclass(frozen=True)
class Equation:
    """F(u), and how near to zero it is to be brought.

    Args:
        forward: the feedforward pass.
        offset: δ_L = F(0), (B, n_L).
        leakage: α̃.
        accuracy: ‖F(u)‖ / ‖δ_L‖ to reach.
        max_iterations: limit on iterations.
    """

    forward: ForwardPass
    offset: Tensor
    leakage: float
    accuracy: float
    max_iterations: int

    def __call__(self, u: Tensor) -> tuple[Tensor, Deviation]:
        """F(u), (B, n_L), and the controlled network behind it."""
        response = self.forward.respond(self.forward.apical(u))
        return self.offset - response.output - self.leakage * u, response

    def linear(self, u: Tensor) -> tuple[Tensor, None]:
        """F(u) of the network linearised at the feedforward state."""
        return self.offset - self.forward.linear_response(self.forward.apical(u)) - self.leakage * u, None

    def samples(self, index: Tensor) -> Equation:
        """That of some samples only; ``index`` as for a tensor's first dimension."""
        return Equation(
            self.forward.samples(index), self.offset[index], self.leakage, self.accuracy, self.max_iterations
        )

    def root(self, inverse: Inverse) -> Root[Deviation]:
        """Broyden's root from the inverse's first step."""
        return find_root(self, inverse.step(self.offset), inverse, self.offset, self.accuracy, self.max_iterations)

    def linear_root(self, inverse: Inverse) -> Root[None]:
        """That of :meth:`linear`."""
        return find_root(
            self.linear, inverse.step(self.offset), inverse, self.offset, self.accuracy, self.max_iterations
        )
