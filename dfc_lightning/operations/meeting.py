"""Where the samples lie in a tensor from outside, by what it meets in a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from dfc_lightning.operations.arguments import named
from dfc_lightning.operations.laying import MATRIX_PRODUCTS
from dfc_lightning.operations.layout import FIRST, Layout
from dfc_lightning.operations.recognise import RECURRENT


def beside(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    tensor: Tensor,
    near: Sequence[tuple[Layout, Tensor]],
    samples: int,
) -> Layout | None:
    """Where the samples lie in a tensor that a call is given from outside; None if it is the same for all.

    Where it meets others, as in a sum, its samples are where those of the others are, counted from the last dimension.

    Args:
        function: what is called.
        args: its positional arguments.
        kwargs: its keyword arguments.
        tensor: the tensor, one of these.
        near: the recorded tensors that are given too, and where their samples lie.
        samples: B.
    """
    name = getattr(function, "__name__", "")
    if name == "embedding" and tensor.dim() > 1 and not tensor.is_floating_point() and tensor.shape[0] == samples:
        return FIRST  # kinds of words, say, all zero by default
    if name in _ALONE or not near:
        return None
    layout, x = near[0]
    batch = x.shape[layout.dim] // (layout.before * layout.rows)
    if name in RECURRENT:
        return Layout(1) if tensor.dim() == 3 and tensor.shape[1] == batch else None
    if name == "multi_head_attention_forward":
        given = named(function, args, kwargs)
        if tensor is given.get("key_padding_mask"):
            return FIRST
        if tensor is given.get("attn_mask"):
            return Layout(0, 1, tensor.shape[0] // batch) if tensor.dim() == 3 else None
        return Layout(1) if any(tensor is given[each] for each in ("query", "key", "value")) else None
    for layout, x in near:
        back, size = x.dim() - layout.dim, x.shape[layout.dim]
        if name in MATRIX_PRODUCTS and back <= 2:
            continue
        if size > 1 and tensor.dim() >= back and tensor.shape[-back] == size:
            return Layout(tensor.dim() - back, layout.before, layout.rows)
    return None


_ALONE = {"linear", "embedding", "batch_norm", "layer_norm", "group_norm", "rms_norm", "instance_norm", "__getitem__"}
_ALONE |= {"index_select", "bilinear", *(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3))}
"""What is given weights, or indices, beside what is recorded."""
