"""The minimum-norm target update: what DFC computes with ideal feedback weights (Theorem 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dfc_lightning.errors import require
from dfc_lightning.network.learning_rule import Control, LearningRule, Update
from dfc_lightning.passes.forward_pass import ForwardPass
from dfc_lightning.passes.gram import gram_factor
from dfc_lightning.passes.plasticity import Plasticity
from dfc_lightning.rules.dfc import steady_gradients
from dfc_lightning.settling.target import NudgedTarget


@dataclass(frozen=True)
class MinimumNorm(LearningRule):
    """Drive the layers by Δv = Jᵀ(JJᵀ + γI)⁻¹ δ_L, the least change of voltages that moves the output by δ_L.

    An oracle: it uses exact Jacobians and no feedback weights. Costs an n_L × n_L Cholesky factor a sample.

    Args:
        damping: γ ≥ 0. With 0 the Jacobian must have full row rank; it has, where the output layer is linear.
        target_stepsize: λ, as in :class:`DFC`.
        plasticity: postsynaptic factor, as in :class:`DFC`.
        controlled_input: presynaptic factors and v_i^ff of the driven network (as DFC's); else those of the
            feedforward pass.
    """

    damping: float = 0.0
    target_stepsize: float = 0.1
    plasticity: Plasticity = "rate_difference"
    controlled_input: bool = True

    def __post_init__(self) -> None:
        require(self.damping >= 0, "damping", self.damping, "give a damping of zero or more")
        NudgedTarget(self.target_stepsize)  # checks it

    @property
    def control(self) -> Control:
        """Target and plasticity."""
        return Control(None, NudgedTarget(self.target_stepsize), self.plasticity)

    def teach(self, forward: ForwardPass, loss_grad: Tensor) -> Update:
        """The update for a batch; see :class:`LearningRule`."""
        offset = NudgedTarget(self.target_stepsize).offset(loss_grad)
        driven = minimum_norm_voltages(forward, offset, self.damping)
        scale = -1 / self.target_stepsize
        if self.controlled_input:
            return Update(steady_gradients(forward, forward.respond(driven), self.plasticity, scale))
        return Update(forward.gradients(forward.postsynaptic(forward.apart(driven), self.plasticity), scale=scale))


def minimum_norm_voltages(forward: ForwardPass, offset: Tensor, damping: float) -> list[Tensor]:
    """J_iᵀ(JJᵀ + γI)⁻¹ δ_L of each point in the shape of its voltage, J = [J_1 … J_L]."""
    jacobians = forward.jacobians()
    solved = torch.cholesky_solve(offset.unsqueeze(2), gram_factor(jacobians, damping))
    return forward.spread([(j.mT @ solved).squeeze(2) for j in jacobians])
