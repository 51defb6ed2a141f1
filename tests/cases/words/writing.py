"""Buffers, indices, writing in place, and what autograd takes for constant."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cases.grammar import Grower, Step, Words

WORDS = Words()
word, one_of = WORDS.word, WORDS.one_of


@word(2)
def with_buffer(g: Grower, h: Tensor) -> Step | None:
    part = g.new(nn.Module())
    shape = h.shape[1:] if g.rng.random() < 0.6 else h.shape[-1:]
    part.register_buffer("value", torch.randn(shape, dtype=torch.float64))
    part.register_buffer("mask", torch.rand(shape) > 0.4)
    return g.pick(
        [
            lambda x: x * part.value,
            lambda x: x + part.value,
            lambda x: x * part.mask,
            lambda x: x.masked_fill(part.mask, -0.5),
            lambda x: torch.where(part.mask, x, part.value),
            lambda x: part.value * x.tanh() + x,
            lambda x: x.masked_fill_(part.mask, 0.1),
        ]
    )


@word(0.7)
def with_counter(g: Grower, h: Tensor) -> Step | None:
    part = g.new(nn.Module())
    part.register_buffer("calls", torch.zeros((), dtype=torch.float64))
    part.register_buffer("mean", torch.zeros(h.shape[1:], dtype=torch.float64))
    g.held = True

    def counted(x: Tensor) -> Tensor:
        part.calls += 1
        return x / part.calls

    def averaged(x: Tensor) -> Tensor:
        with torch.no_grad():
            part.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return x - part.mean

    def averaged_outside(x: Tensor) -> Tensor:
        part.mean = 0.9 * part.mean + 0.1 * x.detach().mean(0)
        return x - part.mean

    return g.pick([counted, averaged, averaged_outside])


@word(2)
def indexed(g: Grower, h: Tensor) -> Step | None:
    n = h.shape[1]
    index = torch.randint(n, (g.size(),))
    return g.pick(
        [
            lambda x: x[:, ::2],
            lambda x: x[:, index],
            lambda x: x.index_select(1, index),
            lambda x: x[..., :2],
            lambda x: x[:, -1:],
            lambda x: x[:, [0, n - 1]],
            lambda x: x.narrow(1, 0, max(1, n // 2)),
            lambda x: torch.take_along_dim(x, x.argsort(1), 1),
            lambda x: x[:, torch.arange(n) % 2 == 0],
            lambda x: x[torch.arange(len(x))],
            lambda x: x[torch.arange(len(x)), x.flatten(1).argmax(1) % x.shape[1]] if x.dim() > 2 else x,
        ]
    )


@word(2)
def written(g: Grower, h: Tensor) -> Step | None:
    def item(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 0] = x[:, -1].tanh()
        return x

    def masked(x: Tensor) -> Tensor:
        x = x * 1
        x[x > 0.5] = 0.5
        return x

    def view(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, :1].mul_(3)
        return x

    def view_kept(x: Tensor) -> Tensor:
        x = x * 2
        part = x[:, 0]
        part.tanh_()
        return x

    def flat(x: Tensor) -> Tensor:
        x = x.clone()
        x.view(-1).mul_(2)
        return x

    def filled(x: Tensor) -> Tensor:
        out = torch.zeros(len(x), x.shape[1] + 1, *x.shape[2:], dtype=x.dtype)
        out[:, 1:] = x
        return out

    def filled_like(x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[:, 0] = x[:, 0]
        out[:, -1] += x[:, -1].sin()
        return out

    def looped(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for k in range(len(x)):
            out[k] = x[k].tanh()
        return out

    def copied(x: Tensor) -> Tensor:
        return torch.empty_like(x).copy_(x)

    def scattered(x: Tensor) -> Tensor:
        return torch.zeros_like(x).scatter(1, x.argsort(1), x)

    def added_at(x: Tensor) -> Tensor:
        return x.index_add(1, torch.tensor([0]), x[:, -1:])

    def data(x: Tensor) -> Tensor:
        x = x.clone()
        x.data.mul_(2)
        return x

    return g.pick([item, masked, view, view_kept, flat, filled, filled_like, looped, copied, scattered, added_at, data])


@word(0.7)
def constant(g: Grower, h: Tensor) -> Step | None:
    """What autograd holds."""
    g.held = True

    def without(x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = 1 + x.abs().amax(tuple(range(1, x.dim())), keepdim=True)
        return x / scale

    return g.pick(
        [
            without,
            lambda x: x / (1 + x.detach().abs()),
            lambda x: x * float(x.detach().flatten()[0]),
            lambda x: x + x.abs().max().item(),
            lambda x: x + (x.round() - x).detach(),
            lambda x: x * x.data,
            lambda x: x + torch.nested.nested_tensor([t for t in x]).to_padded_tensor(0.0),
            lambda x: torch.tensor(x.tolist(), dtype=x.dtype) + x,
            lambda x: torch.from_numpy(x.detach().numpy()) * x,
        ]
    )


@word(0.6)
def loop_by_value(g: Grower, h: Tensor) -> Step | None:
    g.held = True
    return g.pick([lambda x: x.tanh() if x.mean() > 0 else x, lambda x: x * 2 if len(x) > 3 else x + 1])


@word(0.7)
def cast(g: Grower, h: Tensor) -> Step | None:
    down = g.rng.random() < 0.3
    if down:
        g.tolerance = 1e-4
        return lambda x: x.float().tanh().double()
    return g.pick(
        [
            lambda x: x.double(),
            lambda x: x.to(torch.float64),
            lambda x: x.type(torch.float64),
            lambda x: x.to("cpu"),
            lambda x: x.type_as(x),
        ]
    )


@word(0.5)
def remembered(g: Grower, h: Tensor) -> Step | None:
    """For a loss that uses it."""
    module = g.module

    def remember(x: Tensor) -> Tensor:
        module.hidden.append(x)
        return x.clone()

    return remember


one_of(
    "rare",
    0.8,
    lambda h: torch.fft.fft(h).real,
    lambda h: h.bernoulli() if h.min() >= 0 else h.sigmoid().bernoulli() + h,
    lambda h: h.as_strided(h.shape, h.stride()),
    lambda h: torch.func.vmap(torch.tanh)(h),
    lambda h: (
        torch.cdist(h.flatten(1)[:, None], torch.zeros(1, 1, h[0].numel(), dtype=h.dtype)).flatten(1) + h.flatten(1)
    ),
    lambda h: torch.utils.checkpoint.checkpoint(torch.tanh, h, use_reentrant=False),
    lambda h: torch.addmm(h.flatten(1), h.flatten(1), torch.eye(h[0].numel(), dtype=h.dtype)),
    lambda h: h.apply_(lambda v: v) if not h.requires_grad else h,
    lambda h: h.unfold(-1, 2, 1).mean(-1),
)
