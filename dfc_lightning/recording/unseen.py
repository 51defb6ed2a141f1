"""Tensors that layers have made in a way that the tape does not see."""

from __future__ import annotations

from torch import Tensor

from dfc_lightning.errors import ControlError


def refuse_unseen(tensor: Tensor, user: str) -> None:
    """Raise a :class:`ControlError` for a tensor that was not recorded, but has the history of a layer.

    Args:
        tensor: a tensor that has no slot.
        user: what it is given to.
    """
    waiting, seen = [tensor.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (name := getattr(node, "cut_at", None)) is not None:
            raise ControlError(
                f"What {user} is given depends on the layer {name!r} by a way that feedback control cannot follow, "
                "such as torch.func.vmap. Write it in torch functions of tensors, or freeze the layers before it with "
                "requires_grad_(False)."
            )
        waiting.extend(source for source, _ in node.next_functions)
