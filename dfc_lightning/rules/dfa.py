"""Direct feedback alignment (Nøkland 2016): the output error through fixed random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dfc_lightning.network.learning_rule import Direct, LearningRule, Update
from dfc_lightning.passes.forward_pass import ForwardPass


@dataclass(frozen=True)
class DFA(LearningRule):
    """Hidden layers learn from φ'(v_i) ⊙ Q_i ∂ℓ/∂r_L, those that are the output from their own error."""

    feedback: ClassVar[Direct] = Direct(init="xavier_normal")

    def teach(self, forward: ForwardPass, loss_grad: Tensor) -> Update:
        """The update for a batch; see :class:`LearningRule`."""
        fed_back, own = forward.apical(loss_grad), forward.output_errors(loss_grad)
        return Update(forward.gradients([d * q if e is None else e for d, q, e in zip(forward.slopes, fed_back, own)]))
