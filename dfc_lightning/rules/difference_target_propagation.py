"""Difference target propagation (Lee et al. 2015), with the layerwise inverses of Ernoult et al. 2022."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from dfc_lightning.errors import require
from dfc_lightning.feedback_learning.learner import MIRRORED, FeedbackLearning
from dfc_lightning.feedback_learning.reconstruction import DifferenceReconstruction
from dfc_lightning.network.learning_rule import Layerwise, LearningRule, Update
from dfc_lightning.passes.forward_pass import ForwardPass


@dataclass(frozen=True)
class DifferenceTargetPropagation(LearningRule):
    """Each layer is given a target for its voltage, t_{i−1} = v_{i−1} + G_i(t_i) − G_i(v_i), and learns t_i − v_i.

    t_L = v_L − β ∂ℓ_b/∂r_L, and G_i(t) = φ(v_{i−1} + B_iᵀ (t − v_i)) is the way back through a layer: by the feedback
    weights B_i, and with φ where the units before it are, pooling winners and shortcuts as they were. In gradient
    units: divided by β, for which β → 0 is feedback alignment through B_i. They learn by
    :class:`DifferenceReconstruction`.

    The states of Ernoult et al. are rates, and their G_i have φ before the weights and biases of their own.

    Args:
        nudge: β > 0, in units of the gradient of one sample's loss. The authors' are 0.4 to 0.7.
    """

    feedback: ClassVar[Layerwise] = Layerwise(learned=True)
    learning: ClassVar[FeedbackLearning] = replace(
        MIRRORED, method=DifferenceReconstruction(), every_n_batches=1, max_batches=200, lr=0.02
    )

    nudge: float = 0.5

    def __post_init__(self) -> None:
        require(0 < self.nudge < math.inf, "nudge", self.nudge, "give a finite nudge above zero, e.g. 0.5")

    def teach(self, forward: ForwardPass, loss_grad: Tensor) -> Update:
        """The update for a batch; see :class:`LearningRule`."""
        errors = forward.widened(self.nudge, 0.0).pull(loss_grad, through=forward.feedback, live=True)
        return Update(forward.gradients(errors))
