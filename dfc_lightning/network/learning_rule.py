"""What a learning rule is: from output gradients to weight updates, in gradient units."""

# Annotations are not postponed here: jsonargparse would look them up in the modules of the subclasses.

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from dfc_lightning.errors import require
from dfc_lightning.network.initial_feedback import FeedbackInit, LayerwiseInit
from dfc_lightning.passes.forward_pass import ForwardPass
from dfc_lightning.passes.plasticity import Plasticity
from dfc_lightning.settling.controller import PIController
from dfc_lightning.settling.settled import Settled
from dfc_lightning.settling.target import NudgedTarget


@dataclass(frozen=True)
class Direct:
    """Feedback from the output straight to every point, by weights Q_i of the shape (n_i, n_L).

    Args:
        init: their initial values, where the user says nothing else.
        learned: whether they are meant to be learned under the rule.
    """

    init: FeedbackInit = "weight_product"
    learned: bool = False


@dataclass(frozen=True)
class Layerwise:
    """Feedback that travels down layer by layer, by weights B_i in the shape of W_i.

    Args:
        init: ``"random"``, with the spread of W_i, ``"xavier"``, with that of Glorot and Bengio (2010), or
            ``"weights"``, a copy of W_i.
        learned: whether they are meant to be learned in a phase of their own.
        tracking: weight decay of B_i and W_i alike, in units of the learning rate, if B_i takes the steps that the
            optimizer gives W_i (Kolen and Pollack 1994; Akrout et al. 2019); None if it does not.
    """

    init: LayerwiseInit = "random"
    learned: bool = False
    tracking: float | None = None

    def __post_init__(self) -> None:
        known = ("random", "xavier", "weights")
        require(self.init in known, "init", self.init, f"choose one of {known}")
        least = self.tracking is None or 0 <= self.tracking < math.inf
        require(least, "tracking", self.tracking, "give a finite decay of zero or more, or None")


@dataclass(frozen=True)
class Control:
    """How a rule drives the network, for monitors to compare it with the like.

    Args:
        controller: the controller; None where the rule has none.
        target: the output it is driven to.
        plasticity: the postsynaptic factor.
        relative: whether α and k_p are in units of the size of JQ in each sample.
    """

    controller: PIController | None = None
    target: NudgedTarget = field(default_factory=NudgedTarget)
    plasticity: Plasticity = "rate_difference"
    relative: bool = False


@dataclass
class Update:
    """What a rule would have the optimizers see.

    In gradient units: the gradient of the batch-mean loss, were the rule backprop, so that a learning rate keeps
    its meaning from rule to rule.

    Args:
        gradients: for each point, what the weight, the bias and the parameters of a normalisation are taught.
        feedback: what each point's feedback weight is taught, where the rule teaches these too.
        settled: the settled network behind it, where there is one.
    """

    gradients: list[list[Tensor]]
    feedback: list[Tensor] | None = None
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
    """A rule that assigns credit. One that says :meth:`teach` is complete; docs/rules.md shows how to write it."""

    feedback: ClassVar[Direct | Layerwise | None] = None
    """The feedback weights that the rule has; with None none are made."""

    learning: ClassVar[Any] = None
    """The ``FeedbackLearning`` by which they learn in phases of their own, where the user says nothing else."""

    @property
    def control(self) -> Control:
        """How the rule drives the network."""
        return Control()

    @property
    def asks_for_loss(self) -> bool:
        """Whether :meth:`teach` asks for ``forward.label(loss_grad)`` of a loss to be found, as ``link`` is None."""
        return getattr(self, "link", "known") is None

    @abstractmethod
    def teach(self, forward: ForwardPass, loss_grad: Tensor) -> Update:
        """The update for a batch.

        Args:
            forward: the feedforward pass of the batch, bound to weights and feedback weights.
            loss_grad: ∂ℓ_b/∂r_L of each sample's own loss, (B, n_L); finite.
        """
