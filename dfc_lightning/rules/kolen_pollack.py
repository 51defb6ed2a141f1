"""Kolen-Pollack learning (Kolen and Pollack 1994; Akrout et al. 2019): B_i takes every step of W_i, and both decay."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dfc_lightning.network.learning_rule import Layerwise, LearningRule, Update
from dfc_lightning.passes.forward_pass import ForwardPass
from dfc_lightning.rules.feedback_alignment import through


@dataclass(frozen=True)
class KolenPollack(LearningRule):
    """Feedback alignment through weights that learn as the forward weights do: ΔB_i = ΔW_i, with equal decay of both.

    B_i − W_i dies away as ∏(1 − lr · decay), beside what the optimizer's own decay does. Outside a strategy,
    :class:`Tracking` gives B_i the optimizer's steps.

    Args:
        decay: weight decay of W_i and B_i in units of the learning rate, as AdamW has it.
    """

    decay: float = 0.1

    def __post_init__(self) -> None:
        assert self.feedback is not None  # checks the decay

    @property
    def feedback(self) -> Layerwise:  # type: ignore[override]
        """Random at first, then tracking."""
        return Layerwise(tracking=self.decay)

    def teach(self, forward: ForwardPass, loss_grad: Tensor) -> Update:
        """The update for a batch; see :class:`LearningRule`."""
        return through(forward, loss_grad)
