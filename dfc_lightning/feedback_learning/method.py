"""What every way to the gradient of the feedback weights has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, TypeAlias

from torch import Tensor

from dfc_lightning.passes.forward_pass import ForwardPass

Noise: TypeAlias = Callable[[tuple[int, int]], Tensor]
"""A source of standard normal draws of the shape (B, …) it is asked for."""


class FeedbackMethod(ABC):
    """How the gradient of the feedback weights is had."""

    layered: ClassVar[bool] = False
    """Whether it is for layerwise feedback weights B_i, not for direct ones, Q_i."""
    needs_loss: ClassVar[bool] = False
    """Whether the network is driven to its labels meanwhile, which are known by the loss; see :meth:`towards`."""
    gated: bool = False
    """Whether a gradient is summed over the samples alone in which a unit's rate can move; see :class:`Sampled`."""

    @property
    def asks_for_loss(self) -> bool:
        """Whether it asks for ``forward.label(loss_grad)`` of a loss to be found, as ``link`` is None."""
        return getattr(self, "link", "known") is None

    def towards(self, loss_grad: Tensor) -> FeedbackMethod:
        """The method for a batch whose samples' own losses have these gradients ∂ℓ_b/∂r_L, (B, n_L)."""
        return self

    @abstractmethod
    def gradient(self, forward: ForwardPass, noise: Noise) -> list[Tensor]:
        """The gradient for Q_i of each point, (n_i, n_L), or for B_i in the shape of W_i, to be descended.

        Args:
            forward: the feedforward pass, bound to the feedback weights.
            noise: source of standard normal draws.
        """

    def shares(self, forward: ForwardPass) -> list[Tensor] | None:
        """The share of the samples that a gradient is a sum over, to divide it by, one tensor a point; None for all.

        Each goes over into the shape of the gradient, and is a mean over samples: the mean of the gradients of several
        processes is divided by that of their shares.
        """
        return [m.mean(0).unsqueeze(1) for m in forward.able] if self.gated else None

    def draw(self, forward: ForwardPass, noise: Noise) -> list[Tensor]:
        """What a feedback learning step descends: a gradient of the same law as :meth:`gradient`, however drawn."""
        return self.gradient(forward, noise)

    def every_nth_sample(self, forward: ForwardPass) -> int:
        """Which part of the samples a feedback learning step need take for :meth:`draw`: 1 for all of them."""
        return 1
