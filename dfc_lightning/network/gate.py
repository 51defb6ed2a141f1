"""The gate between ``loss.backward()`` and a learning rule.

The network's output passes through an identity whose backward receives dL/dr_L, asks the rule for its
update, and returns that as the gradients of all weights and biases. Autograd then accumulates, reduces over ranks,
unscales and clips as ever. The update is formed here rather than by autograd from per-layer errors, because a
rule's presynaptic factor is the settled rate, not the feedforward one autograd has saved, and a time-integrated
update is no product of the two at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from dfc_lightning.errors import ControlError, require
from dfc_lightning.network.learning_rule import LearningRule, Update
from dfc_lightning.passes.forward_pass import ForwardPass
from dfc_lightning.precision import full_precision
from dfc_lightning.recording.points import ControlPoint
from dfc_lightning.settling.settled import Settled

LossReduction = Literal["mean", "sum"]


class Lesson:
    """One taught step: what was seen in the forward pass and what the rule made of it.

    Args:
        rule: the rule that teaches.
        loss_reduction: how the loss reduces over the batch.
    """

    def __init__(self, rule: LearningRule, loss_reduction: LossReduction = "mean") -> None:
        require(loss_reduction in ("mean", "sum"), "loss_reduction", loss_reduction, 'choose "mean" or "sum"')
        self.rule, self.loss_reduction = rule, loss_reduction
        self.forward: ForwardPass | None = None
        """The forward pass, once the network's output has been reached."""
        self.loss_grad: Tensor | None = None
        """∂ℓ_b/∂r_L of each sample's own loss, (B, n_L), once a backward pass has reached it."""
        self.update: Update | None = None
        """What the rule made of it; the gradients in it have been given away."""
        self.weighs = False
        """Whether to note ``sizes``, for a pull of errors more."""
        self.sizes: tuple[Tensor, Tensor] | None = None
        """The norms of what each point is taught, and of what backprop would teach it, (L,) each."""
        self._points: Sequence[ControlPoint] = ()
        self._scale: Tensor | None = None
        self._versions: list[int] = []

    def watch(self, loss: Tensor) -> None:
        """Name the loss, so that what scales it later does not scale the target stepsize.

        Division for gradient accumulation and a GradScaler's factor reach the network's output multiplied into
        dL/dr_L. With the loss named they are told apart from it, and applied to the update instead. Without this
        call the loss is taken to be what ``backward`` is called on.
        """

        def note(grad: Tensor) -> None:
            self._scale = grad.detach()

        if loss.requires_grad:
            loss.register_hook(note)

    @property
    def taught(self) -> bool:
        """Whether a backward pass has reached the network's output."""
        return self.update is not None

    @property
    def settled(self) -> Settled | None:
        """The settled network, where the rule has one."""
        return None if self.update is None else self.update.settled

    def open(self, forward: ForwardPass, points: Sequence[ControlPoint], output: Tensor) -> Tensor:
        """Put the gate on the network's output, (B, n_L).

        Args:
            forward: the forward pass.
            points: the control points.
            output: what the last layer returned.
        """
        self.forward, self._points = forward, points
        if not torch.is_grad_enabled():
            return output
        self._versions = [t._version for t in forward.made_of()]
        return _Gate.apply(self, output.detach(), *(p for point in points for p in point.parameters))

    def teach(self, output_grad: Tensor) -> list[Tensor]:
        """Gradients of the network's parameters for dL/dr_L, (B, n_L)."""
        forward = self.forward
        assert forward is not None
        if [t._version for t in forward.made_of()] != self._versions:  # autograd would guard it likewise
            raise ControlError(
                "The network's input, rates or weights were modified in place between its forward pass and backward(). "
                "Step the optimizer after backward(), and clone() what is to be changed."
            )
        dtype = forward.output.dtype
        scale = output_grad.new_ones((), dtype=dtype) if self._scale is None else self._scale.to(dtype)
        grad = output_grad.to(dtype)
        samples = forward.batch_size
        if samples == 0:  # nothing was seen, and so nothing is taught, as by autograd
            self.update = Update([])
            return [torch.zeros_like(p) for point in self._points for p in point.parameters]
        share = samples if self.loss_reduction == "mean" else 1
        with torch.no_grad(), full_precision(grad.device):
            self.loss_grad = torch.nan_to_num(grad * (share / scale), 0.0, 0.0, 0.0)
            self.update = self._complete(self.rule.teach(forward, self.loss_grad))
            if self.weighs:
                backprop = forward.gradients(forward.pull(self.loss_grad, live=True))
                self.sizes = _sizes(self.update.gradients), _sizes(backprop)
            # An overflow under AMP must still be seen by the GradScaler: then this factor is NaN.
            factor = scale * (samples / share) + 0 * grad.sum()
            return [
                value.mul_(factor).to(parameter.dtype)
                for point, taught in zip(self._points, self.update.gradients)
                for parameter, value in zip(point.parameters, self._checked(point, taught))
            ]

    def _complete(self, update: Update) -> Update:
        if len(update.gradients) != len(self._points):
            names = ", ".join(repr(point.name) for point in self._points)
            raise ControlError(
                f"{type(self.rule).__name__} teaches {len(update.gradients)} layers, but the network has "
                f"{len(self._points)}: {names}. Return what forward.gradients(signals) gives, with one signal a point."
            )
        return update

    def _checked(self, point: ControlPoint, taught: Sequence[Tensor]) -> Sequence[Tensor]:
        given, needed = [tuple(t.shape) for t in taught], [tuple(p.shape) for p in point.parameters]
        if given != needed:
            raise ControlError(
                f"{type(self.rule).__name__} teaches the layer {point.name!r} gradients of the shapes {given}, but its "
                f"parameters have {needed}. Return what forward.gradients(signals) gives, with one signal a point."
            )
        return taught


def _sizes(gradients: Sequence[Sequence[Tensor]]) -> Tensor:
    """The norm of each point's, (L,)."""
    return torch.stack([torch.stack([torch.linalg.vector_norm(g) for g in point]).norm() for point in gradients])


class _Gate(torch.autograd.Function):
    """Identity on the output; its backward hands the rule's update to the parameters."""

    @staticmethod
    def forward(ctx: Any, lesson: Lesson, output: Tensor, *parameters: Tensor) -> Tensor:
        ctx.lesson = lesson
        return output.clone()  # a view could not be worked on in place, and would share the activity's memory

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *output_grads: Tensor) -> Any:
        gradients = ctx.lesson.teach(output_grads[0])
        needed = ctx.needs_input_grad[2:]
        return None, None, *(g if need else None for g, need in zip(gradients, needed))
