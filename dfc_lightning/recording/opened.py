"""Calls that hide several uses of parameters in one kernel, written out: attention, and recurrent layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfc_lightning.operations.arguments import named
from dfc_lightning.operations.recognise import RECURRENT

KERNELS = ("multi_head_attention_forward", *RECURRENT)
"""Calls that hide several uses of parameters."""


def opened(
    function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], learns: Callable[[], bool]
) -> Callable[[], Any] | None:
    """What does the same as a call, in functions of tensors; None for a call that hides nothing.

    Args:
        function: what is called.
        args: its positional arguments.
        kwargs: its keyword arguments.
        learns: whether parameters that are to be taught are among them.
    """
    name = getattr(function, "__name__", "")
    if name == "scaled_dot_product_attention":
        given = named(function, args, kwargs)
        return (lambda: _attended(given)) if given.get("dropout_p") else None
    if name not in KERNELS or not learns():
        return None
    if name == "multi_head_attention_forward":
        given = named(function, args, kwargs)
        plain = given["query"].dim() == 3 and given["bias_k"] is None and not given["add_zero_attn"]
        static = given.get("static_k") is not None or given.get("static_v") is not None
        return (lambda: _multi_head(given)) if plain and not static else None
    if name in RECURRENT and isinstance(args[3], bool) and args[0].dim() == 3:
        return lambda: _recurrent(name, *args)
    return None


# Attention


def _attended(given: dict[str, Any]) -> Tensor:
    """Scaled dot-product attention with dropout, whose masks are to be kept."""
    q, k, v, mask = (given.get(name) for name in ("query", "key", "value", "attn_mask"))
    assert q is not None and k is not None and v is not None
    if given.get("enable_gqa"):
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    if given.get("is_causal"):
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -torch.inf)
    scale = given.get("scale") or 1 / math.sqrt(q.shape[-1])
    return F.dropout(_shares(q * scale, k, mask), given["dropout_p"]) @ v


def _shares(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    return torch.softmax(scores if mask is None else scores + mask, dim=-1)


def _multi_head(given: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """``torch.nn.functional.multi_head_attention_forward`` of sequences (T, B, C)."""
    query, key, value, heads = given["query"], given["key"], given["value"], given["num_heads"]
    if given.get("use_separate_proj_weight"):
        weights: Sequence[Any] = [given[f"{name}_proj_weight"] for name in "qkv"]
    elif query is key is value:
        weights = ()
    else:
        weights = given["in_proj_weight"].chunk(3)
    bias = given["in_proj_bias"]
    if weights:
        biases = [None] * 3 if bias is None else bias.chunk(3)
        projected = [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases)]
    else:
        projected = list(F.linear(query, given["in_proj_weight"], bias).chunk(3, dim=-1))
    q, k, v = (x.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for x in projected)
    mask = _mask(given, q, k)
    dropout = given["dropout_p"] if given.get("training", True) else 0.0
    wants_shares = given.get("need_weights", True)
    if wants_shares or dropout:
        shares = _shares(q / math.sqrt(q.shape[-1]), k, mask)
        heard = (F.dropout(shares, dropout) if dropout else shares) @ v
    else:
        heard = F.scaled_dot_product_attention(q, k, v, mask)
    found = F.linear(heard.permute(2, 0, 1, 3).flatten(2), given["out_proj_weight"], given["out_proj_bias"])
    if not wants_shares:
        return found, None
    return found, shares.mean(1) if given.get("average_attn_weights", True) else shares


def _mask(given: dict[str, Any], q: Tensor, k: Tensor) -> Tensor | None:
    """What is added to the scores, (…, T, S): −∞ where nothing is to be heard."""
    found = None
    for name in ("attn_mask", "key_padding_mask"):
        mask = given.get(name)
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -torch.inf)
        if name == "key_padding_mask":
            mask = mask[:, None, None]
        elif mask.dim() == 3:
            mask = mask.unflatten(0, (-1, given["num_heads"]))
        found = mask if found is None else found + mask
    return found


# Recurrence


def _lstm(x: Tensor, recurrent: Tensor, before: Sequence[Tensor]) -> list[Tensor]:
    i, f, g, o = (x + recurrent).chunk(4, dim=-1)
    c = torch.sigmoid(f) * before[1] + torch.sigmoid(i) * torch.tanh(g)
    return [torch.sigmoid(o) * torch.tanh(c), c]


def _gru(x: Tensor, recurrent: Tensor, before: Sequence[Tensor]) -> list[Tensor]:
    (r, z, n), (hr, hz, hn) = x.chunk(3, dim=-1), recurrent.chunk(3, dim=-1)
    z = torch.sigmoid(z + hz)
    n = torch.tanh(n + torch.sigmoid(r + hr) * hn)
    return [n + z * (before[0] - n)]


CELLS: dict[str, Callable[[Tensor, Tensor, Sequence[Tensor]], list[Tensor]]] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": lambda x, recurrent, before: [torch.tanh(x + recurrent)],
    "rnn_relu": lambda x, recurrent, before: [torch.relu(x + recurrent)],
}
"""The states after a step: given W_ih x + b_ih, W_hh h + b_hh, and the states before."""


def _recurrent(
    name: str,
    x: Tensor,
    hx: Any,
    weights: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """A recurrent layer, step by step, as torch's kernels return it."""
    starts = list(hx) if isinstance(hx, (tuple, list)) else [hx]
    time, ways = int(batch_first), 1 + bidirectional
    per = len(weights) // (layers * ways)
    ends: list[list[Tensor]] = []
    for layer in range(layers):
        if layer and dropout and training:
            x = F.dropout(x, dropout)
        outputs = []
        for way in range(ways):
            k = layer * ways + way
            w_in, w_on, *rest = weights[k * per : (k + 1) * per]
            b_in, b_on = rest[:2] if has_biases else (None, None)
            projection = rest[-1] if len(rest) == (3 if has_biases else 1) else None
            driven = F.linear(x, w_in, b_in)
            still = x.select(time, 0)[:, :1] * 0  # zeros of the samples, whatever their number
            states = [start[k] + still for start in starts]
            steps: list[Tensor] = []
            times = range(x.shape[time])
            for t in reversed(times) if way else times:
                states = CELLS[name](driven.select(time, t), F.linear(states[0], w_on, b_on), states)
                if projection is not None:
                    states[0] = F.linear(states[0], projection)
                steps.append(states[0])
            outputs.append(torch.stack(steps[::-1] if way else steps, dim=time))
            ends.append(states)
        x = torch.cat(outputs, dim=-1) if bidirectional else outputs[0]
    return (x, *(torch.stack(each) for each in zip(*ends)))
