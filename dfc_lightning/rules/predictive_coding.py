"""Predictive coding with additive errors (Rao and Ballard 1999; Whittington and Bogacz 2017).

In the form of Goemaere et al. 2025 ("Error Optimization"): what is inferred are the errors, not the states.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dfc_lightning.errors import require
from dfc_lightning.losses.link import Link
from dfc_lightning.losses.linked_loss import LinkedLoss, check_link
from dfc_lightning.network.learning_rule import Control, LearningRule, Update
from dfc_lightning.passes.forward_pass import ForwardPass
from dfc_lightning.settling.equilibrium import Equilibrium
from dfc_lightning.settling.error_feedback import ErrorFeedback
from dfc_lightning.settling.inference import Inference
from dfc_lightning.settling.settled import Settled
from dfc_lightning.settling.target import ClampedTarget


@dataclass(frozen=True)
class PredictiveCoding(LearningRule):
    """ΔW_i ∝ ε_i r_{i−1}ᵀ, where the errors ε_i, added to the voltages, make ½ Σ ‖ε_i‖² + β ℓ small.

    The output has no ε: its error is the loss's own. At equilibrium ε_i = −β J_iᵀ ∂ℓ, all taken at the inferred state,
    and what W learns by is the gradient of the energy there. In gradient units: divided by β, and by how far an
    inference of few steps comes. β → 0 is backprop, with a departure of order β, of order β² if ``centred``. Where
    batches are normalised, W learns by feedforward rates: docs/equilibrium.md.

    Args:
        inference: how the errors find their values: ``Equilibrium()``, or ``Descent(steps, rate)``.
        nudge: β > 0.
        centred: infer twice, with β and −β, and take the difference (Scellier et al. 2023).
        link: the output's own nonlinearity g, or the loss by it and its scale; None to have it found by the strategy.
    """

    inference: Inference = field(default_factory=Equilibrium)
    nudge: float = 0.1
    centred: bool = False
    link: Link | LinkedLoss | None = None

    def __post_init__(self) -> None:
        require(0 < self.nudge < math.inf, "nudge", self.nudge, "give a finite nudge above zero, e.g. 1.0")
        check_link(self.link)

    @property
    def control(self) -> Control:
        """The target."""
        return Control(None, ClampedTarget(), "voltage_difference")

    def teach(self, forward: ForwardPass, loss_grad: Tensor) -> Update:
        """The update for a batch; see :class:`LearningRule`."""
        feedback = ErrorFeedback(forward, forward.label(loss_grad, self.link), drives_output=False)
        settled, taught = self._side(feedback, self.nudge)
        if self.centred:
            _, other = self._side(feedback, -self.nudge)
            taught = [[(a + b) / 2 for a, b in zip(each, against)] for each, against in zip(taught, other)]
        return Update(taught, settled=settled)

    def _side(self, feedback: ErrorFeedback, nudge: float) -> tuple[Settled, list[list[Tensor]]]:
        """The network inferred with one nudge, and what it teaches."""
        forward = feedback.forward
        settled = self.inference.infer(feedback, nudge)
        counted = settled.counted(drop_unconverged=False)
        response = settled.response_of(counted)
        error = torch.where(counted.unsqueeze(1), feedback.error(response), 0.0)
        signals = feedback.pulled(error, response, live=True)
        if not forward.batched:  # else errors of held batch statistics would drive what a normalisation takes out again
            ends, unit = set(forward.outputs_at), nudge * self.inference.share
            signals = [t if i in ends else a / unit for i, (t, a) in enumerate(zip(signals, response.driven))]
        return settled, forward.gradients(signals, feedback.rates(response), scale=-1.0)
