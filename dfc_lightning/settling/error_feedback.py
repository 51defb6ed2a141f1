"""The output's error of a driven network, and the way on which it comes back to what drives each point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dfc_lightning.losses.linked_loss import Label
from dfc_lightning.passes.forward_pass import Deviation, ForwardPass


@dataclass(frozen=True)
class ErrorFeedback:
    """The error −∂ℓ_b/∂r_L of a driven network, and how it is pulled back to what drives the network.

    Args:
        forward: the feedforward pass. Errors come back through B_i if it is bound to layered feedback, straight by Q_i
            if to direct feedback, and through W_i if to none.
        label: what the loss wants of the output.
        drives_output: whether the points that are the output are driven too.
    """

    forward: ForwardPass
    label: Label
    drives_output: bool = True

    def error(self, state: Deviation | None = None) -> Tensor:
        """The error of the network driven so, (B, n_L), c (y − g(r_L)); None for the feedforward one."""
        return -self.label.loss_grad(None if state is None else state.output)

    def gained(self, driven: Sequence[Tensor]) -> Tensor:
        """What driving the points takes from the feedforward error, to first order, (B, n_L)."""
        return self.label.grad_tangent(self.forward.linear_response(driven))

    def back(self, error: Tensor, state: Deviation | None = None) -> list[Tensor]:
        """J_i(a)ᵀ ``error`` of each point that is driven, zero of the others."""
        found = self.pulled(error, state)
        if self.drives_output:
            return found
        ends = set(self.forward.outputs_at)
        return [torch.zeros_like(a) if i in ends else a for i, a in enumerate(found)]

    def pulled(self, error: Tensor, state: Deviation | None = None, live: bool = False) -> list[Tensor]:
        """The same of all points; ``live`` as of :meth:`ForwardPass.pull`."""
        forward = self.forward
        if forward.feedback and not forward.layered:
            return forward.apical(error)
        return forward.pull(error, through=forward.feedback if forward.layered else None, at=state, live=live)

    def rates(self, state: Deviation) -> list[Tensor] | None:
        """What weights learn by beside errors pulled back ``live``, r_{i−1} of the driven network.

        Feedforward, None, where samples are normalised by their batch: W_i r_{i−1} as driven is not what the statistics
        are of, so that weights would learn to change in scale, which changes nothing but leaves running statistics
        behind.
        """
        return None if self.forward.batched else self.forward.heard(state)

    def samples(self, index: Tensor) -> ErrorFeedback:
        """That of some samples only."""
        return ErrorFeedback(self.forward.samples(index), self.label.samples(index), self.drives_output)
