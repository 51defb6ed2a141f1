"""Branches, pooling and reductions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cases.grammar import Grower, Step, Words

WORDS = Words()
word, one_of = WORDS.word, WORDS.one_of


# Pooling and reductions


@word(3)
def pooling(g: Grower, h: Tensor) -> Step | None:
    if h.dim() < 3:
        return None
    k, d = g.rng.choice([2, 3]), h.dim() - 3
    made = [
        (nn.MaxPool1d, nn.MaxPool2d)[d](2),
        (nn.MaxPool1d, nn.MaxPool2d)[d](3, 1, 1),
        (nn.AvgPool1d, nn.AvgPool2d)[d](k),
    ]
    made += [(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)[d](k), (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d)[d](2)]
    made += [(nn.LPPool1d, nn.LPPool2d)[d](2, 2), (nn.MaxPool1d, nn.MaxPool2d)[d](2, ceil_mode=True)]
    made += [
        nn.Upsample(scale_factor=2),
        (nn.ConstantPad1d, nn.ConstantPad2d)[d](1, 0.5),
        (nn.ReflectionPad1d, nn.ReflectionPad2d)[d](1),
    ]
    return g.pick_part(made)


@word(0.5)
def pooling_with_indices(g: Grower, h: Tensor) -> Step | None:
    if h.dim() != 4:
        return None
    return lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2, output_size=x.shape)


@word(3)
def reduction(g: Grower, h: Tensor) -> Step | None:
    if h.dim() < 3:
        return None
    d = g.dim(h)
    return g.pick(
        [
            lambda x: x.mean(d),
            lambda x: x.sum(d),
            lambda x: x.amax(d),
            lambda x: x.max(d).values,
            lambda x: x.max(dim=d)[0],
            lambda x: x.std(d),
            lambda x: x.var(dim=d, unbiased=False),
            lambda x: x.norm(dim=d),
            lambda x: torch.logsumexp(x, d),
            lambda x: x.median(d).values,
            lambda x: x.select(d, 0),
            lambda x: x.mean(-1) + x.amax(-1),
            lambda x: torch.linalg.vector_norm(x, dim=d),
            lambda x: x.topk(2, d).values.sum(d),
        ]
    )


@word(3)
def within_a_sample(g: Grower, h: Tensor) -> Step | None:
    d = g.dim(h)
    return g.pick(
        [
            lambda x: x.topk(min(2, x.shape[d]), d).values,
            lambda x: x.sort(d).values,
            lambda x: x.cumsum(d),
            lambda x: x - x.mean(d, keepdim=True),
            lambda x: (x - x.mean(d, True)) / (x.std(d, keepdim=True) + 0.1),
            lambda x: F.normalize(x, dim=d),
            lambda x: x / x.norm(dim=d, keepdim=True).clamp(min=0.1),
            lambda x: x.softmax(d),
            lambda x: x * x.softmax(dim=d),
            lambda x: F.layer_norm(x, x.shape[-1:]),
            lambda x: x.gather(d, x.argsort(d)),
            lambda x: x * F.one_hot(x.argmax(-1), x.shape[-1]),
            lambda x: x.flip(d),
            lambda x: x.roll(1, d),
            lambda x: x.cummax(d).values,
            lambda x: x.diff(dim=d),
            lambda x: x.kthvalue(1, d, keepdim=True).values + x,
            lambda x: x.masked_fill(x < x.mean(d, keepdim=True), 0.1),
            lambda x: x.renorm(2, 0, 1.0),
        ]
    )


# Branches


@word(5)
def branch_added(g: Grower, h: Tensor) -> Step | None:
    run, out = g.branch(h, g.rng.randrange(1, 4))
    if out.shape != h.shape:
        return None
    return g.pick(
        [
            lambda x: x + run(x),
            lambda x: run(x).add_(x),
            lambda x: torch.add(x, run(x), alpha=0.5),
            lambda x: x - run(x),
        ]
    )


@word(4)
def branch_beside_branch(g: Grower, h: Tensor) -> Step | None:
    (a, left), (b, right) = g.branch(h, g.rng.randrange(1, 3)), g.branch(h, g.rng.randrange(1, 3))
    ways: list[Step] = []
    if left.shape == right.shape:
        ways += [lambda x: a(x) * torch.sigmoid(b(x)), lambda x: a(x) + b(x), lambda x: torch.maximum(a(x), b(x))]
        ways += [lambda x: torch.where(b(x) > 0, a(x), b(x)), lambda x: torch.stack([a(x), b(x)], 1).mean(1)]
        ways += [lambda x: torch.stack([a(x), b(x)]).sum(0), lambda x: sum([a(x), b(x)])]
    if left.dim() == right.dim() and left.shape[2:] == right.shape[2:]:
        ways += 2 * [lambda x: torch.cat([a(x), b(x)], 1), lambda x: torch.cat((b(x), x, a(x)), dim=1)]
    if left.dim() == right.dim() == 3 and left.shape[2] == right.shape[2]:
        ways += [lambda x: torch.bmm(a(x), b(x).transpose(1, 2)), lambda x: a(x) @ b(x).mT]
    ways += [lambda x: torch.cat([a(x).flatten(1), b(x).flatten(1)], -1)]
    return g.pick(ways)


@word(0.5)
def branch_of_attention(g: Grower, h: Tensor) -> Step | None:
    if h.dim() != 3:
        return None
    q, k, v = (g.new(nn.Linear(h.shape[-1], h.shape[-1])) for _ in range(3))
    return lambda x: F.scaled_dot_product_attention(q(x), k(x), v(x))


@word(2.5)
def parts_of_it(g: Grower, h: Tensor) -> Step | None:
    d = g.dim(h)
    n = h.shape[d]
    ways: list[Step] = [lambda x: torch.cat(x.split(2, d)[::-1], d), lambda x: torch.stack(x.unbind(d), d).tanh()]
    ways += [
        lambda x: torch.cat([t.tanh() for t in x.tensor_split(2, d)], d),
        lambda x: sum(x.unbind(d)) if x.dim() > 2 else x,
    ]
    if n % 2 == 0:
        ways += 2 * [
            lambda x: (lambda a, b: a * b.sigmoid())(*x.chunk(2, d)),
            lambda x: torch.cat([x.chunk(2, d)[1], x], d),
        ]
        ways += [lambda x: F.glu(x, d)]
    return g.pick(ways)
