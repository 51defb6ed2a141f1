"""The minimum-norm target update: what DFC computes with ideal feedback weights (Theorem 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dfc_lightning.control.checks import require
from dfc_lightning.control.evaluator import Evaluator, ForwardPass
from dfc_lightning.control.plasticity import Plasticity
from dfc_lightning.control.target import NudgedTarget
from dfc_lightning.rules.dfc import steady_update
from dfc_lightning.rules.rule import LearningRule, Update


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

    def teach(self, chain: Evaluator, activity: ForwardPass, loss_grad: Tensor) -> Update:
        """The update for a batch; see :class:`LearningRule`."""
        offset = NudgedTarget(self.target_stepsize).offset(loss_grad)
        driven = minimum_norm_voltages(chain, activity, offset, self.damping)
        scale = -1 / (self.target_stepsize * activity.batch_size)
        if self.controlled_input:
            response = chain.respond(activity, driven)
            return Update(steady_update(chain, activity, response, self.plasticity, scale))
        signals = chain.postsynaptic(activity, chain.apart(activity, driven), self.plasticity)
        return Update(chain.update(activity, signals, activity.presynaptic(), scale))


def minimum_norm_voltages(chain: Evaluator, activity: ForwardPass, offset: Tensor, damping: float) -> list[Tensor]:
    """J_iᵀ(JJᵀ + γI)⁻¹ δ_L of each layer, one (B, n_i) each, J = [J_1 … J_L]."""
    jacobians = chain.jacobians(activity)
    gram = sum((j @ j.mT for j in jacobians[1:]), start=jacobians[0] @ jacobians[0].mT)
    gram.diagonal(dim1=1, dim2=2).add_(damping)
    factor, _ = torch.linalg.cholesky_ex(gram)
    solved = torch.cholesky_solve(offset.unsqueeze(2), factor)
    return [(j.mT @ solved).squeeze(2) for j in jacobians]
