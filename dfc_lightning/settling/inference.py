"""How the errors of predictive coding find their values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from dfc_lightning.errors import require
from dfc_lightning.passes.forward_pass import Deviation
from dfc_lightning.settling.error_feedback import ErrorFeedback
from dfc_lightning.settling.settled import DIVERGED_BEYOND, Settled, share_missed


class Inference(ABC):
    """A way to errors a_i that make the energy ½ Σ ‖a_i‖² + β ℓ(r_L(a)) small."""

    @property
    def share(self) -> float:
        """How far it comes on its way where the error does not change on it: 1 for the whole."""
        return 1.0

    @abstractmethod
    def infer(self, feedback: ErrorFeedback, nudge: float) -> Settled:
        """The driven network.

        Args:
            feedback: the output's error, −∂ℓ/∂r_L, and its way back.
            nudge: β; below zero, the loss is to grow.
        """


@dataclass(frozen=True)
class Descent(Inference):
    """So many gradient steps on the energy, from a = 0: a ← a − η (a + β J(a)ᵀ ∂ℓ(r_L(a))).

    Each is one pull and one forward pass (Goemaere et al. 2025, "Error Optimization"). The residual of a sample is what
    is left of its output error. There is no tolerance: all count as converged but those whose error has grown
    ``DIVERGED_BEYOND`` times.

    Args:
        steps: their number.
        rate: η. One step of 1 takes the backpropagated errors themselves.
    """

    steps: int = 5
    rate: float = 0.1

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", self.steps, "make at least one step")
        require(0 < self.rate <= 1, "rate", self.rate, "give a rate above zero, and up to 1")

    @property
    def share(self) -> float:
        """1 − (1 − η)ⁿ."""
        return 1 - (1 - self.rate) ** self.steps

    def infer(self, feedback: ErrorFeedback, nudge: float) -> Settled:
        """The driven network; see :class:`Inference`."""
        state: Deviation | None = None
        driven = [torch.zeros_like(v) for v in feedback.forward.v]
        for _ in range(self.steps):
            wanted = feedback.back(nudge * feedback.error(state), state)
            driven = [a.lerp(to, self.rate) for a, to in zip(driven, wanted)]
            state = feedback.forward.respond(driven)
        assert state is not None
        error = feedback.error(state)
        left = share_missed(error, feedback.error())
        return Settled(nudge * error, state, left, left <= DIVERGED_BEYOND, self.steps)
