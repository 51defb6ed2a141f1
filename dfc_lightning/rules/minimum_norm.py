"""The minimum-norm target update: what DFC computes with ideal feedback weights (Theorem 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dfc_lightning.errors import require
from dfc_lightning.network.learning_rule import Control, LearningRule, Update
from dfc_lightning.passes.forward_pass import ForwardPass, gain_size, joint_norm, scaled
from dfc_lightning.passes.gram import gram_factor
from dfc_lightning.passes.plasticity import Plasticity
from dfc_lightning.rules.dfc import relative_size
from dfc_lightning.settling.target import NudgedTarget


@dataclass(frozen=True)
class MinimumNorm(LearningRule):
    """Drive the layers by Δv = Jᵀ(JJᵀ + γI)⁻¹ δ_L, the least change of voltages that moves the output by δ_L.

    An oracle: it uses exact Jacobians and no feedback weights. Costs an n_L × n_L Cholesky factor a sample.

    Args:
        damping: γ ≥ 0. With 0 the Jacobian must have full row rank; it has, where the output layer is linear.
        target_stepsize: λ, as in :class:`DFC`.
        plasticity: postsynaptic factor, as in :class:`DFC`.
        relative: give γ in units of the size of JJᵀ, ‖JJᵀ δ_L‖ / ‖δ_L‖ in each sample, and let what is driven teach
            by as much as Jᵀ δ_L itself, as in :class:`DFC`.
        controlled_input: presynaptic factors and v_i^ff of the driven network (as DFC's); else those of the
            feedforward pass.
    """

    damping: float = 0.0
    target_stepsize: float = 0.1
    plasticity: Plasticity = "rate_difference"
    controlled_input: bool = True
    relative: bool = False

    def __post_init__(self) -> None:
        require(self.damping >= 0, "damping", self.damping, "give a damping of zero or more")
        NudgedTarget(self.target_stepsize)  # checks it

    @property
    def control(self) -> Control:
        """Target and plasticity."""
        return Control(None, NudgedTarget(self.target_stepsize), self.plasticity, self.relative)

    def teach(self, forward: ForwardPass, loss_grad: Tensor) -> Update:
        """The update for a batch; see :class:`LearningRule`."""
        offset, scale = NudgedTarget(self.target_stepsize).offset(loss_grad), -1 / self.target_stepsize
        driven = minimum_norm_voltages(forward, offset, self.damping, self.relative)
        response = forward.respond(driven) if self.controlled_input else forward.apart(driven)
        signals = forward.postsynaptic(response, self.plasticity)
        if self.relative:
            signals = scaled(signals, relative_size(joint_norm(forward.pull(offset)), driven))
        return Update(forward.gradients(signals, forward.heard(response) if self.controlled_input else None, scale))


def minimum_norm_voltages(forward: ForwardPass, offset: Tensor, damping: float, relative: bool = False) -> list[Tensor]:
    """J_iᵀ(JJᵀ + γI)⁻¹ δ_L of each point in the shape of its voltage, J = [J_1 … J_L].

    Args:
        forward: the feedforward pass.
        offset: δ_L, (B, n_L).
        damping: γ.
        relative: whether that is in units of ‖JJᵀ δ_L‖ / ‖δ_L‖ of each sample.
    """
    jacobians = forward.jacobians()
    factor = gram_factor(jacobians, relative_damping(jacobians, offset) * damping if relative else damping)
    solved = torch.cholesky_solve(offset.unsqueeze(2), factor)
    return forward.spread([(j.mT @ solved).squeeze(2) for j in jacobians])


def relative_damping(jacobians: Sequence[Tensor], offset: Tensor) -> Tensor:
    """‖JJᵀ δ_L‖ / ‖δ_L‖ of each sample, (B, 1); 1 where either is zero."""
    error = offset.unsqueeze(2)
    gained = torch.stack([j @ (j.mT @ error) for j in jacobians]).sum(0).squeeze(2)
    return gain_size(gained, offset)
