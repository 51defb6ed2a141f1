"""Forward gradients (Baydin et al. 2022): the loss's slope along one random direction of all voltages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dfc_lightning.network.learning_rule import LearningRule, Update
from dfc_lightning.passes.forward_pass import ForwardPass


@dataclass(frozen=True)
class ForwardGradient(LearningRule):
    """Each sample's voltages learn from (Σ_i J_i ξ_i · ∂ℓ/∂r_L) ξ_i, with ξ white noise of unit variance.

    Its mean over the noise is backprop's error J_iᵀ ∂ℓ/∂r_L; its variance grows with the number of units. No error
    travels back: the slope is had by one linearised forward pass. Points that are the output learn from their own
    error.
    """

    def teach(self, forward: ForwardPass, loss_grad: Tensor) -> Update:
        """The update for a batch; see :class:`LearningRule`."""
        own, drawing = forward.output_errors(loss_grad), forward.chance.drawing()
        drawn = [
            drawing.of_samples(v.shape).to(v) if e is None else torch.zeros_like(v) for v, e in zip(forward.v, own)
        ]
        slope = torch.linalg.vecdot(forward.linear_response(drawn), loss_grad)
        signals = [slope.view(-1, *[1] * (xi.dim() - 1)) * xi if e is None else e for xi, e in zip(drawn, own)]
        return Update(forward.gradients(signals))
