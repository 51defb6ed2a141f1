"""Sign-concordant feedback (Liao, Leibo and Poggio 2016): errors travel back through the signs of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dfc_lightning.errors import require
from dfc_lightning.network.initial_feedback import xavier_spread
from dfc_lightning.network.learning_rule import Layerwise, LearningRule, Update
from dfc_lightning.passes.chance import Drawing
from dfc_lightning.passes.forward_pass import ForwardPass
from dfc_lightning.rules.feedback_alignment import through

VARIANTS = ("uniform", "batch_random", "fixed_random")


@dataclass(frozen=True)
class SignSymmetry(LearningRule):
    """Feedback alignment through B_i = sign W_i ⊙ M_i.

    Args:
        variant: of M_i: ``"uniform"`` (uSF): √(2 / (n_i + n_{i−1})) throughout, of convolutions by their fan-in and
            fan-out; ``"batch_random"`` (brSF): the absolute value of normal draws with that deviation, new for each
            batch; ``"fixed_random"`` (frSF): such draws, made once.
    """

    variant: Literal["uniform", "batch_random", "fixed_random"] = "uniform"

    def __post_init__(self) -> None:
        require(self.variant in VARIANTS, "variant", self.variant, f"choose one of {VARIANTS}")

    @property
    def feedback(self) -> Layerwise | None:  # type: ignore[override]
        """The draws of ``"fixed_random"``; the others have none to keep."""
        return Layerwise(init="xavier") if self.variant == "fixed_random" else None

    def teach(self, forward: ForwardPass, loss_grad: Tensor) -> Update:
        """The update for a batch; see :class:`LearningRule`."""
        drawing = forward.chance.drawing()
        found = [
            w.sign() * self._sizes(forward, i, w, drawing) if w is not None and hears else loss_grad.new_empty(0)
            for i, (w, hears) in enumerate(zip(forward.layer_weights(), forward.hears))
        ]
        return through(forward.with_feedback(found, layered=True), loss_grad)

    def _sizes(self, forward: ForwardPass, index: int, weight: Tensor, drawing: Drawing) -> Tensor | float:
        if self.variant == "fixed_random":
            return forward.feedback[index].abs()
        spread = xavier_spread(weight)
        if self.variant == "uniform":
            return spread
        return drawing.shared(weight.shape).abs().to(weight) * spread
