"""What a settling method returns, and the interface of all of them."""

# Annotations are not postponed here: jsonargparse would look them up in the modules of the subclasses.

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dfc_lightning.errors import require
from dfc_lightning.passes.forward_pass import Deviation, ForwardPass
from dfc_lightning.passes.plasticity import Plasticity
from dfc_lightning.settling.controller import PIController

DIVERGED_BEYOND = 10.0
"""The residual beyond which a sample counts as diverged; without control it is 1."""


@dataclass
class Settled:
    """A controlled network at the end of settling.

    Failing to settle is a result, not an exception: look at ``residual`` and ``converged``.

    Args:
        control: the control signal u, (B, n_L).
        response: deviations of every layer from feedforward.
        residual: ‖δ_L − δr_L − α̃ u‖ / ‖δ_L‖ of each sample, (B,): zero at the exact steady state.
        converged: samples whose residual meets the method's tolerance, (B,) bool.
        iterations: solver iterations or time steps made.
    """

    control: Tensor
    response: Deviation
    residual: Tensor
    converged: Tensor
    iterations: int

    def counted(self, drop_unconverged: bool) -> Tensor:
        """Samples that may teach, (B,) bool: never those that have diverged.

        Diverged is what holds an infinity or NaN, or has missed its steady state by ``DIVERGED_BEYOND`` times as
        much as no control at all.

        Args:
            drop_unconverged: only those that have converged.
        """
        sound = (self.residual <= DIVERGED_BEYOND) & torch.isfinite(self.control).all(1)
        return sound & self.converged if drop_unconverged else sound

    def response_of(self, counted: Tensor) -> Deviation:
        """The deviations of the samples of a mask, (B,), and none of the rest."""
        return self.response if counted.all() else self.response.where(counted)


Taught = list[list[Tensor]]
"""For each point, what its weight, its bias and the parameters of a normalisation are taught."""


class Settling(ABC):
    """A way to the controlled steady state."""

    chains_only: ClassVar[bool] = False
    """Whether the method is for chains of dense layers alone."""

    @abstractmethod
    def settle(self, forward: ForwardPass, offset: Tensor, controller: PIController) -> Settled:
        """Settle the controlled network.

        Args:
            forward: the network's feedforward pass.
            offset: target minus feedforward output, δ_L, (B, n_L).
            controller: the controller.
        """


@dataclass(frozen=True)
class Simulation(Settling):
    """A settling method that passes through time, so that an update can be averaged over it.

    Args:
        steps: T, the number of steps; the published ``tmax`` counts states, so its value less one.
    """

    steps: int = 1000

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", self.steps, "simulate at least one step")

    @abstractmethod
    def settle_and_integrate(
        self,
        forward: ForwardPass,
        offset: Tensor,
        controller: PIController,
        plasticity: Plasticity,
        drop_unconverged: bool,
    ) -> tuple[Settled, Taught]:
        """Settle, and return also the mean over batch and time of postsynaptic · presynapticᵀ (and of its bias twin).

        The mean is over all samples of the batch and all ``steps`` + 1 states, the first of which, feedforward, gives
        none.

        Args:
            forward: the network's feedforward pass.
            offset: target minus feedforward output, δ_L, (B, n_L).
            controller: the controller.
            plasticity: the postsynaptic factor.
            drop_unconverged: leave out samples that have not converged; diverged ones are always left out.
        """


def relative_residual(offset: Tensor, output: Tensor, control: Tensor, leakage: float) -> Tensor:
    """‖δ_L − δr_L − α̃ u‖ / ‖δ_L‖ of each sample, (B,); zero for a sample whose target is met from the start."""
    return share_missed(offset - output - leakage * control, offset)


def share_missed(missing: Tensor, offset: Tensor) -> Tensor:
    """The norm of what is missing by that of the error at the start, (B,); of a sample without error, the norm."""
    missed, size = (torch.linalg.vector_norm(each, dim=1) for each in (missing, offset))
    return torch.where(size > 0, missed / size, missed)


def at_rest(
    forward: ForwardPass, offset: Tensor, error: Tensor, leak: Tensor, tolerance: float, error_reduction: float
) -> Tensor:
    """Which simulated samples count as converged, (B,) bool, by the two criteria of the authors' published code.

    Args:
        forward: the feedforward pass.
        offset: δ_L, the error at the start, (B, n_L).
        error: e = r_L* − r_L at the end, (B, n_L).
        leak: α̃ u, what e is at the steady state, (B, n_L).
        tolerance: bound on ‖e − α̃ u‖ in units of the feedforward output's norm.
        error_reduction: bound on ‖e‖ in units of its first value.
    """
    near = torch.linalg.vector_norm(error - leak, dim=1) < tolerance * torch.linalg.vector_norm(forward.output, dim=1)
    reduced = torch.linalg.vector_norm(error, dim=1) < error_reduction * torch.linalg.vector_norm(offset, dim=1)
    return near & reduced
