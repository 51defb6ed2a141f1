"""Direct random target projection (Frenkel, Lefebvre and Bol 2021): labels through fixed random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dfc_lightning.losses.link import Link
from dfc_lightning.losses.linked_loss import LinkedLoss, check_link
from dfc_lightning.network.learning_rule import Direct, LearningRule, Update
from dfc_lightning.passes.forward_pass import ForwardPass


@dataclass(frozen=True)
class DirectRandomTargetProjection(LearningRule):
    """Hidden layers learn from −φ'(v_i) ⊙ Q_i y, those that are the output from their own error.

    That is :class:`DFA` by the label alone: of ∂ℓ/∂r_L = g(r_L) − y only −y is fed back, which is known before the
    network's output is.

    Args:
        link: the output's own nonlinearity g, by which y is told from the gradient of the loss, or the loss by it and
            its scale; None to have it found by the strategy.
    """

    feedback: ClassVar[Direct] = Direct(init="xavier_normal")

    link: Link | LinkedLoss | None = None

    def __post_init__(self) -> None:
        check_link(self.link)

    def teach(self, forward: ForwardPass, loss_grad: Tensor) -> Update:
        """The update for a batch; see :class:`LearningRule`.

        Raises:
            ControlError: the loss is not the one that ``link`` says.
        """
        label = forward.label(loss_grad, self.link)
        own = forward.output_errors(loss_grad)
        projected = forward.apical(-label.scale * label.label)
        return Update(forward.gradients([d * q if e is None else e for d, q, e in zip(forward.slopes, projected, own)]))
