"""Nothing of a hidden layer may reach the loss but through the network's output: no error would come back for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dfc_lightning.errors import ControlError


class _Cut(torch.autograd.Function):
    """Hands a voltage on without its history; a gradient that comes back has gone past the output."""

    @staticmethod
    def forward(ctx: Any, voltage: Tensor, anchor: Tensor, name: str) -> Tensor:
        ctx.cut_at = name
        ctx.mark_dirty(voltage)  # what follows may work in place, as it may on the layer's own output
        return voltage

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise ControlError(
            f"The loss depends on what the layer {ctx.cut_at!r} has computed by a way beside the network's output. "
            "Feedback control takes the loss of that output alone, and would not teach the rest: let the last layer "
            "come last, and detach() what is only to be looked at."
        )


def cut(output: Tensor, name: str) -> Tensor:
    """A layer's output without its history, on which a gradient that comes back is an error."""
    handed = output.detach()
    if not (torch.is_grad_enabled() and output.is_floating_point()):
        return handed
    anchor = torch.zeros((), requires_grad=True, device=output.device)
    return _Cut.apply(handed, anchor, name)  # type: ignore[no-any-return]


def refuse_history(what: str, received: Tensor) -> None:
    """Raise a :class:`ControlError` if a tensor, a layer's input say, was made by something that wants to learn."""
    if not (received.requires_grad and torch.is_grad_enabled()):
        return
    waiting, seen = [received.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node in seen or hasattr(node, "cut_at"):
            continue
        seen.add(node)
        if node is None or hasattr(node, "variable"):  # the input itself, or a leaf that it is made of
            raise ControlError(
                f"{what} wants a gradient, but feedback control sends none back through a layer: what computes it "
                "would not learn. Freeze that with requires_grad_(False), or detach() it."
            )
        waiting.extend(source for source, _ in node.next_functions if source is not None)
