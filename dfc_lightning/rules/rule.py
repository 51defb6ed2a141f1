"""What a learning rule is: from output gradients to weight updates, in gradient units."""

# Annotations are not postponed here: jsonargparse would look them up in the modules of the subclasses.

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dfc_lightning.control.evaluator import Evaluator, ForwardPass
from dfc_lightning.control.feedback import FeedbackInit
from dfc_lightning.settling.settled import Settled


@dataclass
class Update:
    """What a rule would have the optimizer see.

    In gradient units: the gradient of the batch-mean loss, were the rule backprop, so that a learning rate keeps
    its meaning from rule to rule.

    Args:
        gradients: for each point, what the weight, the bias and the parameters of a normalisation are taught.
        settled: the settled network behind it, where there is one.
    """

    gradients: list[list[Tensor]]
    settled: Settled | None = None

    @property
    def weights(self) -> list[Tensor]:
        """Those of the layers' weights, W_i."""
        return [taught[0] for taught in self.gradients]

    @property
    def biases(self) -> list[Tensor]:
        """Those of the layers' biases, where all have one."""
        return [taught[1] for taught in self.gradients]


class LearningRule(ABC):
    """A rule that assigns credit."""

    learns_feedback: ClassVar[bool] = False
    """Whether the feedback weights Q_i are meant to be learned under this rule."""

    feedback_init: ClassVar[FeedbackInit] = "weight_product"
    """The initial feedback weights the rule is meant to have."""

    @abstractmethod
    def teach(self, chain: Evaluator, activity: ForwardPass, loss_grad: Tensor) -> Update:
        """The update for a batch.

        Args:
            chain: weights and feedback weights.
            activity: the feedforward pass of the batch.
            loss_grad: ∂ℓ_b/∂r_L of each sample's own loss, (B, n_L); finite.
        """
