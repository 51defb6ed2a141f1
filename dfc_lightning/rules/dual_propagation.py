"""Dual propagation (Høier et al. 2023): errors as the difference of two activities of each unit."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from dfc_lightning.errors import require
from dfc_lightning.network.learning_rule import LearningRule, Update
from dfc_lightning.passes.forward_pass import ForwardPass


@dataclass(frozen=True)
class DualPropagation(LearningRule):
    """Backprop with φ'(v) δ replaced by [φ(v + β δ) − φ(v − β δ)] / 2β at every nonlinearity.

    The two activities of a unit, s⁺ and s⁻, are β δ to either side of the feedforward voltage, as in the authors' code
    for convolutional networks. Max-pooling passes errors to the feedforward winners. β → 0 is backprop, from which it
    departs by order β² where φ is smooth.

    Args:
        nudge: β > 0, in units of the errors of one sample's loss. The authors' is one over the batch size.
    """

    nudge: float = 1.0

    def __post_init__(self) -> None:
        require(0 < self.nudge < math.inf, "nudge", self.nudge, "give a finite nudge above zero, e.g. 1.0")

    def teach(self, forward: ForwardPass, loss_grad: Tensor) -> Update:
        """The update for a batch; see :class:`LearningRule`."""
        return Update(forward.gradients(forward.widened(self.nudge).pull(loss_grad, live=True)))
