"""The output the controller drives the network to, Eq. (3): r_L* = r_L⁻ − λ ∂ℓ_b/∂r_L."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from dfc_lightning.errors import require


@dataclass(frozen=True)
class NudgedTarget:
    """A small step down the per-sample loss.

    Args:
        stepsize: the target stepsize λ > 0, per sample: the loss's mean over the batch is undone first.
    """

    stepsize: float = 0.1

    def __post_init__(self) -> None:
        require(
            0 < self.stepsize < math.inf, "target_stepsize", self.stepsize, "give a finite step above zero, e.g. 0.1"
        )

    def offset(self, loss_grad: Tensor) -> Tensor:
        """Target minus feedforward output, δ_L = −λ ∂ℓ_b/∂r_L, shape (B, n_L).

        Args:
            loss_grad: ∂ℓ_b/∂r_L, the gradient of each sample's own loss, shape (B, n_L).
        """
        return -self.stepsize * loss_grad


@dataclass(frozen=True)
class ClampedTarget(NudgedTarget):
    """The full step λ = 1: for ℓ_b = ½‖r_L − y‖² the target is y itself."""

    stepsize: float = 1.0
