"""The gate between ``loss.backward()`` and a learning rule.

The last control point's output passes through an identity whose backward receives dL/dr_L, asks the rule for its
update, and returns that as the gradients of all weights and biases. Autograd then accumulates, reduces over ranks,
unscales and clips as ever. The update is formed here rather than by autograd from per-layer errors, because a
rule's presynaptic factor is the settled rate, not the feedforward one autograd has saved, and a time-integrated
update is no product of the two at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from dfc_lightning.control.checks import ControlError, require
from dfc_lightning.control.evaluator import Evaluator, ForwardPass
from dfc_lightning.control.points import ControlPoint

LossReduction = Literal["mean", "sum"]


class Gradients(Protocol):
    """What a rule answers with: for each point, what its parameters are taught."""

    gradients: list[list[Tensor]]


class Rule(Protocol):
    """What the gate asks of a learning rule."""

    def teach(self, chain: Evaluator, activity: ForwardPass, loss_grad: Tensor) -> Any:
        """:class:`Gradients` for the per-sample output gradients ``loss_grad``, (B, n_L)."""


class Lesson:
    """One taught step: what was seen in the forward pass and what the rule made of it.

    Args:
        rule: the rule that teaches.
        loss_reduction: how the loss reduces over the batch.
    """

    def __init__(self, rule: Rule, loss_reduction: LossReduction = "mean") -> None:
        require(loss_reduction in ("mean", "sum"), "loss_reduction", loss_reduction, 'choose "mean" or "sum"')
        self.rule, self.loss_reduction = rule, loss_reduction
        self.activity: ForwardPass | None = None
        self.chain: Evaluator | None = None
        self.settled: Any = None  # the settled network, where the rule has one
        self._taught = False
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
        return self._taught

    def open(self, activity: ForwardPass, chain: Evaluator, points: Sequence[ControlPoint], output: Tensor) -> Tensor:
        """Put the gate on the network's output, (B, n_L).

        Args:
            activity: the forward pass.
            chain: the network as it was then.
            points: its control points.
            output: what the last layer returned.
        """
        self.activity, self.chain, self._points = activity, chain, points
        if not torch.is_grad_enabled():
            return output
        self._versions = _versions(activity, chain)
        return _Gate.apply(self, output.detach(), *(p for point in points for p in point.parameters))

    def teach(self, output_grad: Tensor) -> list[Tensor]:
        """Gradients of the network's parameters for dL/dr_L, (B, n_L)."""
        activity, chain = self.activity, self.chain
        assert activity is not None and chain is not None
        if _versions(activity, chain) != self._versions:
            raise ControlError(
                "The network's input, rates or weights were modified in place between its forward pass and backward(). "
                "Step the optimizer after backward(), and clone() what is to be changed."
            )
        dtype = activity.output.dtype
        scale = output_grad.new_ones((), dtype=dtype) if self._scale is None else self._scale.to(dtype)
        grad = output_grad.to(dtype)
        samples = activity.batch_size
        if samples == 0:  # nothing was seen, and so nothing is taught, as by autograd
            self._taught = True
            return [torch.zeros_like(p) for point in self._points for p in point.parameters]
        share = samples if self.loss_reduction == "mean" else 1
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            self.loss_grad = loss_grad = torch.nan_to_num(grad * (share / scale), 0.0, 0.0, 0.0)
            update = self.rule.teach(chain, activity, loss_grad)
            self.settled, self._taught = getattr(update, "settled", None), True
            # An overflow under AMP must still be seen by the GradScaler: then this factor is NaN.
            factor = scale * (samples / share) + 0 * grad.sum()
            gradients = []
            for point, taught in zip(self._points, update.gradients):
                for parameter, value in zip(point.parameters, taught):
                    gradients.append(value.mul_(factor).to(parameter.dtype))
        return gradients


def _versions(activity: ForwardPass, chain: Evaluator) -> list[int]:
    """How often what the update is made of has been modified in place; autograd would guard it likewise."""
    return [t._version for t in chain.made_of(activity)]


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
