"""The weight mirror (Akrout et al. 2019): feedback alignment through weights that learn from noise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from dfc_lightning.feedback_learning.learner import MIRRORED, FeedbackLearning
from dfc_lightning.feedback_learning.mirror import SampledMirror
from dfc_lightning.network.learning_rule import Layerwise, LearningRule, Update
from dfc_lightning.passes.forward_pass import ForwardPass
from dfc_lightning.rules.feedback_alignment import through


@dataclass(frozen=True)
class WeightMirror(LearningRule):
    """Feedback alignment through B_i that learn in a mirror phase to follow W_i; see :class:`SampledMirror`."""

    feedback: ClassVar[Layerwise] = Layerwise(learned=True)
    learning: ClassVar[FeedbackLearning] = replace(
        MIRRORED, method=SampledMirror(), every_n_batches=1, max_batches=200, lr=0.02
    )

    def teach(self, forward: ForwardPass, loss_grad: Tensor) -> Update:
        """The update for a batch; see :class:`LearningRule`."""
        return through(forward, loss_grad)
