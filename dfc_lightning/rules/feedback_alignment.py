"""Feedback alignment (Lillicrap et al. 2016): errors travel back through fixed random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dfc_lightning.network.learning_rule import Layerwise, LearningRule, Update
from dfc_lightning.passes.forward_pass import ForwardPass


@dataclass(frozen=True)
class FeedbackAlignment(LearningRule):
    """δ_i = φ'(v_i) ⊙ B_{i+1}ᵀ δ_{i+1}, B_i fixed and random with the spread of the initial W_i."""

    feedback: ClassVar[Layerwise] = Layerwise()

    def teach(self, forward: ForwardPass, loss_grad: Tensor) -> Update:
        """The update for a batch; see :class:`LearningRule`."""
        return through(forward, loss_grad)


def through(forward: ForwardPass, loss_grad: Tensor) -> Update:
    """Backpropagation of the output errors through B_i in place of W_i; batch statistics follow their batch."""
    return Update(forward.gradients(forward.pull(loss_grad, through=forward.feedback, live=True)))
