"""The least-control principle (Meulemans et al. 2022, "The least-control principle for local learning at equilibrium").

The network is driven to its label by the least control ψ that does it, and each weight learns to make the control
superfluous: ΔW_i ∝ ψ_i r_{i−1}ᵀ at the controlled state.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dfc_lightning.errors import require
from dfc_lightning.losses.link import Link
from dfc_lightning.losses.linked_loss import LinkedLoss, check_link
from dfc_lightning.network.learning_rule import Control, Direct, Layerwise, LearningRule, Update
from dfc_lightning.passes.forward_pass import ForwardPass, scaled
from dfc_lightning.rules.dfc import relative_size
from dfc_lightning.settling.controller import PIController
from dfc_lightning.settling.equilibrium import Equilibrium
from dfc_lightning.settling.error_feedback import ErrorFeedback
from dfc_lightning.settling.target import ClampedTarget

Through = Literal["weights", "kolen_pollack", "learned"]
THROUGH = ("weights", "kolen_pollack", "learned")


@dataclass(frozen=True)
class LeastControl(LearningRule):
    """ΔW_i ∝ ψ_i r_{i−1}ᵀ with ψ_i = J_i(ψ)ᵀ u and −∂ℓ(r_L) = α u, the derivatives taken at the controlled state.

    For α → 0 the sum of ‖ψ_i‖² is the smallest that reaches the label; for α → ∞ this is backprop. In between it is the
    gradient of ½ Σ ‖ψ_i‖² + ℓ(r_L(ψ)) / α at its stationary point. Where batches are normalised, r_{i−1} is
    feedforward: docs/equilibrium.md.

    Control this strong needs feedback that follows the network: through random B_i, as Kolen-Pollack learning begins,
    J K has no sign, and what reaches the label drives the layers anywhere.

    Args:
        through: how u comes back: ``"weights"``, through W_i itself (exact); ``"kolen_pollack"``, through B_i that take
            W_i's steps, after a mirror phase; ``"learned"``, straight from the output by Q_i, learned in phases.
        alpha: α > 0.
        relative: give α in units of the size of J Jᵀ along the error in each sample, and let what is driven teach by as
            much, over all voltages of a sample, as the error pulled back feedforward; what α → ∞ would teach. Without,
            α is in the units of J Jᵀ and ψ teaches as it is, as published; the update fades as they grow.
        decay: weight decay of W_i and B_i under ``"kolen_pollack"``, in units of the learning rate.
        equilibrium: how ψ is found.
        link: the output's own nonlinearity g, or the loss by it and its scale; None to have it found by the strategy.
    """

    through: Through = "weights"
    alpha: float = 10.0
    relative: bool = True
    decay: float = 0.1
    equilibrium: Equilibrium = field(default_factory=Equilibrium)
    link: Link | LinkedLoss | None = None

    def __post_init__(self) -> None:
        require(self.through in THROUGH, "through", self.through, f"choose one of {THROUGH}")
        require(self.alpha > 0, "alpha", self.alpha, "give a leakage above zero, e.g. 0.1")
        check_link(self.link)
        assert self.feedback is None or self.feedback  # checks the decay

    @property
    def feedback(self) -> Direct | Layerwise | None:  # type: ignore[override]
        """What ``through`` asks for."""
        return {
            "weights": None,
            "kolen_pollack": Layerwise(learned=True, tracking=self.decay),
            "learned": Direct(learned=True),
        }[self.through]

    @property
    def control(self) -> Control:
        """Controller and target."""
        return Control(PIController(alpha=self.alpha), ClampedTarget(), "voltage_difference", self.relative)

    def teach(self, forward: ForwardPass, loss_grad: Tensor) -> Update:
        """The update for a batch; see :class:`LearningRule`."""
        feedback = ErrorFeedback(forward, forward.label(loss_grad, self.link))
        settled, drive = self.equilibrium.find(feedback, self.alpha, self.relative)
        counted = settled.counted(drop_unconverged=False)
        response = settled.response_of(counted)
        sizes = relative_size(drive, response.driven) if self.relative else torch.ones_like(drive)
        if (
            forward.batched and self.through != "learned"
        ):  # as backprop does, see LayeredDFC: samples are in it together
            control = torch.where(counted.unsqueeze(1), settled.control * sizes, 0.0)
            signals = feedback.pulled(control, response, live=True)
        else:
            signals = scaled(response.driven, sizes)
        return Update(forward.gradients(signals, feedback.rates(response), scale=-1.0), settled=settled)
