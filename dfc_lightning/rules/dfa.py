"""Direct feedback alignment (Nøkland 2016): the output error through fixed random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dfc_lightning.control.evaluator import Evaluator, ForwardPass
from dfc_lightning.control.feedback import FeedbackInit
from dfc_lightning.rules.rule import LearningRule, Update


@dataclass(frozen=True)
class DFA(LearningRule):
    """Hidden layers learn from φ'(v_i) ⊙ Q_i ∂ℓ/∂r_L, the output layer from its own gradient."""

    feedback_init: ClassVar[FeedbackInit] = "xavier_normal"

    def teach(self, chain: Evaluator, activity: ForwardPass, loss_grad: Tensor) -> Update:
        """The update for a batch; see :class:`LearningRule`."""
        slopes = activity.slopes
        signals = [d * error for d, error in zip(slopes, chain.spread(chain.apical(loss_grad)))]
        if signals[-1].shape == loss_grad.shape:
            signals[-1] = slopes[-1] * loss_grad
        return Update(chain.update(activity, signals, activity.presynaptic(), 1 / activity.batch_size))
