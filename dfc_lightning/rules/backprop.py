"""Backpropagation, to measure other rules against and to check the plumbing with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dfc_lightning.network.learning_rule import LearningRule, Update
from dfc_lightning.passes.forward_pass import ForwardPass


@dataclass(frozen=True)
class Backprop(LearningRule):
    """The gradient of the loss, formed from the network's own errors J_iᵀ ∂ℓ/∂r_L."""

    def teach(self, forward: ForwardPass, loss_grad: Tensor) -> Update:
        """The update for a batch; see :class:`LearningRule`."""
        return Update(forward.gradients(forward.pull(loss_grad, live=True)))
