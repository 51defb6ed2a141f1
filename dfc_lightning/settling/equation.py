"""What is to be solved for the steady state: F(u) = δ_L − δr_L(u) − α̃ u = 0, one root of size n_L a sample."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from dfc_lightning.passes.forward_pass import Deviation, ForwardPass
from dfc_lightning.settling.broyden import Aux, Inverse, Root, find_root
from dfc_lightning.settling.budget import Budget


@dataclass(frozen=True)
class Equation:
    """F(u), and how near to zero it is to be brought.

    Args:
        forward: the feedforward pass.
        offset: δ_L = F(0), (B, n_L).
        leakage: α̃.
        accuracy: ‖F(u)‖ / ‖δ_L‖ to reach.
        max_iterations: limit on iterations.
        budget: what evaluations and gains are counted against, shared by the equations of some of its samples.
    """

    forward: ForwardPass
    offset: Tensor
    leakage: float
    accuracy: float
    max_iterations: int
    budget: Budget

    @property
    def affordable(self) -> int:
        """Iterations that may be made, the first evaluation not counted."""
        return min(self.max_iterations, max(int(min(self.budget.each(len(self.offset)), 1e9)) - 1, 0))

    def affords(self, passes: float) -> bool:
        """Whether so many passes of this equation's samples are left."""
        return self.budget.each(len(self.offset)) >= passes

    def spend(self, passes: float) -> None:
        """Count passes of this equation's samples."""
        self.budget.spend(len(self.offset), passes)

    def __call__(self, u: Tensor) -> tuple[Tensor, Deviation]:
        """F(u), (B, n_L), and the controlled network behind it."""
        response = self.forward.respond(self.forward.apical(u))
        return self.offset - response.output - self.leakage * u, response

    def linear(self, u: Tensor) -> tuple[Tensor, None]:
        """F(u) of the network linearised at the feedforward state."""
        return self.offset - self.forward.linear_response(self.forward.apical(u)) - self.leakage * u, None

    def samples(self, index: Tensor) -> Equation:
        """That of some samples only; ``index`` as for a tensor's first dimension."""
        return replace(self, forward=self.forward.samples(index), offset=self.offset[index])

    def root(self, inverse: Inverse, start: Tensor | None = None) -> Root[Deviation]:
        """Broyden's root from ``start``, (B, n_L), or else from the inverse's first step."""
        start = inverse.step(self.offset) if start is None else start
        return self._counted(find_root(self, start, inverse, self.offset, self.accuracy, self.affordable))

    def linear_root(self, inverse: Inverse) -> Root[None]:
        """That of :meth:`linear`."""
        return self._counted(
            find_root(self.linear, inverse.step(self.offset), inverse, self.offset, self.accuracy, self.affordable)
        )

    def _counted(self, root: Root[Aux]) -> Root[Aux]:
        self.spend(1 + root.iterations)
        return root
