"""Backpropagation, to measure other rules against and to check the plumbing with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dfc_lightning.control.evaluator import Evaluator, ForwardPass
from dfc_lightning.rules.rule import LearningRule, Update


@dataclass(frozen=True)
class Backprop(LearningRule):
    """The gradient of the loss, formed from the network's own errors J_iᵀ ∂ℓ/∂r_L."""

    def teach(self, chain: Evaluator, activity: ForwardPass, loss_grad: Tensor) -> Update:
        """The update for a batch; see :class:`LearningRule`."""
        signals = chain.spread(chain.errors(activity, loss_grad, live=True))
        return Update(chain.update(activity, signals, activity.presynaptic(), 1 / activity.batch_size))
