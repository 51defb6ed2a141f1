"""Direct random target projection (Frenkel, Lefebvre and Bol 2021): labels through fixed random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dfc_lightning.errors import require
from dfc_lightning.network.learning_rule import Direct, LearningRule, Update
from dfc_lightning.passes.forward_pass import ForwardPass
from dfc_lightning.settling.link import LINKS, Link, linked, refuse_other_losses


@dataclass(frozen=True)
class DirectRandomTargetProjection(LearningRule):
    """Hidden layers learn from −φ'(v_i) ⊙ Q_i y, those that are the output from their own error.

    That is :class:`DFA` by the label alone: of ∂ℓ/∂r_L = g(r_L) − y only −y is fed back, which is known before the
    network's output is.

    Args:
        link: the output's own nonlinearity g, by which y is told from the gradient of the loss: cross entropy of
            logits, or half a squared error.
    """

    feedback: ClassVar[Direct] = Direct(init="xavier_normal")

    link: Link = "softmax"

    def __post_init__(self) -> None:
        require(self.link in LINKS, "link", self.link, f"choose one of {LINKS}")

    def teach(self, forward: ForwardPass, loss_grad: Tensor) -> Update:
        """The update for a batch; see :class:`LearningRule`.

        Raises:
            ControlError: the loss is not the one that ``link`` says.
        """
        refuse_other_losses(self.link, forward, loss_grad)
        own = forward.output_errors(loss_grad)
        projected = forward.apical(loss_grad - linked(self.link, forward.output))
        return Update(forward.gradients([d * q if e is None else e for d, q, e in zip(forward.slopes, projected, own)]))
