"""Backpropagation, to measure other rules against and to check the plumbing with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dfc_lightning.control.chain import Activity, Chain
from dfc_lightning.rules.rule import LearningRule, Update


@dataclass(frozen=True)
class Backprop(LearningRule):
    """The gradient of the loss, formed from the chain's own errors J_iᵀ ∂ℓ/∂r_L."""

    def teach(self, chain: Chain, activity: Activity, loss_grad: Tensor) -> Update:
        """The update for a batch; see :class:`LearningRule`."""
        signals = chain.errors(activity.slopes, loss_grad)
        return Update(*chain.outer(signals, activity.presynaptic(), 1 / activity.batch_size))
