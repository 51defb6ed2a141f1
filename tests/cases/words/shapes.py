"""Shapes inside samples, across them, and what mixes samples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cases.grammar import Grower, Step, Words

WORDS = Words()
word, one_of = WORDS.word, WORDS.one_of


@word(4)
def shape_inside(g: Grower, h: Tensor) -> Step | None:
    shape, n = h.shape[1:], h[0].numel()
    ways: list[Step] = [lambda x: x.flatten(1), lambda x: x.reshape(len(x), -1), lambda x: x.reshape(x.shape[0], -1, 1)]
    ways += [
        lambda x: x.unsqueeze(1),
        lambda x: x[:, None].expand(-1, 2, *x.shape[1:]),
        lambda x: x.contiguous().view(x.size(0), n),
    ]
    ways += [
        lambda x: x.reshape(-1, *shape[::-1]),
        lambda x: x.view(-1, *shape).clone(),
        lambda x: x.squeeze(),
        lambda x: x.reshape(-1, n),
    ]
    if n % 2 == 0:
        ways += [lambda x: x.reshape(-1, 2, n // 2), lambda x: x.flatten(1).unflatten(1, (2, -1))]
    if h.dim() == 3:
        ways += [
            lambda x: x.transpose(1, 2),
            lambda x: x.permute(0, 2, 1).contiguous(),
            lambda x: x.mT,
            lambda x: x.swapaxes(1, 2),
        ]
    if h.dim() == 4:
        ways += [lambda x: x.permute(0, 2, 3, 1), lambda x: x.flatten(2).transpose(1, 2), lambda x: x.movedim(1, -1)]
    ways += [
        lambda x: x.repeat(1, 2, *[1] * (x.dim() - 2)),
        lambda x: x.repeat_interleave(2, dim=1),
        lambda x: F.pad(x, (1, 0)),
    ]
    return g.pick(ways)


@word(1)
def shape_of_a_fixed_batch(g: Grower, h: Tensor) -> Step | None:
    shape, batch = h.shape[1:], g.batch
    return g.pick(
        [lambda x: x.reshape(batch, -1), lambda x: x.view(batch, *shape), lambda x: x.reshape(batch, *shape[::-1])]
    )


@word(2)
def across(g: Grower, h: Tensor) -> Step | None:
    """Where the batch is not the first dimension for a while."""
    ways: list[Step] = [
        lambda x: x.transpose(0, 1).tanh().transpose(0, 1),
        lambda x: x.movedim(0, -1).sin().movedim(-1, 0),
    ]
    if h.dim() == 2:
        ways += [lambda x: x.T.relu().T, lambda x: x.t().contiguous().t(), lambda x: torch.einsum("bi->ib", x).T]
    if h.dim() == 3:
        inner = g.new(nn.Linear(h.shape[-1], g.size()))
        ways += 2 * [
            lambda x: inner(x.flatten(0, 1)).view(len(x), x.shape[1], -1),
            lambda x: inner(x.transpose(0, 1)).transpose(0, 1),
        ]
        ways = ways[2:]
    if h.dim() == 4:
        ways += [lambda x: x.flatten(0, 1).amax(1).view(len(x), x.shape[1], -1)]
    return g.pick(ways)


@word(0.5)
def among_samples(g: Grower, h: Tensor) -> Step | None:
    g.held = True
    return g.pick(
        [
            lambda x: x - x.mean(0),
            lambda x: x.flip(0),
            lambda x: x.roll(1, 0),
            lambda x: x / x.abs().max(),
            lambda x: x + x[:1],
            lambda x: x.softmax(0),
            lambda x: x[torch.randperm(len(x))],
            lambda x: (x - x.mean((0, -1), keepdim=True)) / (x.std() + 1),
            lambda x: x.cumsum(0),
            lambda x: torch.cat([x, x])[: len(x)],
            lambda x: x.sort(0).values,
            lambda x: x * (x.flatten(1) @ x.flatten(1).T).mean(),
            lambda x: x.renorm(2, 1, 1.0),
            lambda x: x[torch.arange(len(x) - 1, -1, -1)],
            lambda x: x * torch.arange(len(x), dtype=x.dtype).view(-1, *[1] * (x.dim() - 1)),
        ]
    )
