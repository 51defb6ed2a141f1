"""Layers and normalisations, frozen, hooked, tied and called twice too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cases.grammar import Grower, Step, Words

WORDS = Words()
word, one_of = WORDS.word, WORDS.one_of


# Layers


def layer_for(g: Grower, h: Tensor) -> nn.Module:
    bias, n = g.rng.random() < 0.8, g.size()
    if h.dim() == 2 or g.rng.random() < 0.2:
        return nn.Linear(h.shape[-1], n, bias)
    dims = h.dim() - 2
    groups = 2 if h.shape[1] % 2 == 0 and n % 2 == 0 and g.rng.random() < 0.3 else 1
    kind = (nn.Conv1d, nn.Conv2d)[dims - 1]
    if g.rng.random() < 0.25:
        kind = (nn.ConvTranspose1d, nn.ConvTranspose2d)[dims - 1]
        return kind(
            h.shape[1],
            n,
            g.rng.choice([1, 2, 3]),
            g.rng.choice([1, 1, 2]),
            padding=g.rng.choice([0, 0, 1]),
            groups=groups,
            bias=bias,
        )
    if g.rng.random() < 0.2:
        return kind(
            h.shape[1],
            n,
            3,
            padding="same",
            bias=bias,
            padding_mode=g.rng.choice(["zeros", "zeros", "circular", "reflect"]),
        )
    return kind(
        h.shape[1],
        n,
        g.rng.choice([1, 2, 3]),
        g.rng.choice([1, 1, 2]),
        padding=g.rng.choice([0, 1]),
        groups=groups,
        bias=bias,
    )


@word(14)
def layer(g: Grower, h: Tensor) -> Step | None:
    return g.new(layer_for(g, h))


@word(5)
def layer_with_norm(g: Grower, h: Tensor) -> Step | None:
    first = g.new(layer_for(g, h))
    then = norm(g, first(h))
    return None if then is None else lambda x: then(first(x))


@word(1.2)
def layer_frozen(g: Grower, h: Tensor) -> Step | None:
    return g.new(layer_for(g, h)).requires_grad_(False)


@word(0.6)
def layer_half_frozen(g: Grower, h: Tensor) -> Step | None:
    part = g.new(layer_for(g, h))
    g.rng.choice([p for p in part.parameters()]).requires_grad_(False)
    return part


@word(0.35)
def layer_hooked(g: Grower, h: Tensor) -> Step | None:
    part, do = g.new(layer_for(g, h)), g.rng.choice([torch.tanh, lambda t: 2 * t, torch.relu_])
    part.register_forward_hook(lambda m, args, out: do(out))
    return part


@word(0.5)
def layer_hooked_before(g: Grower, h: Tensor) -> Step | None:
    part = g.new(layer_for(g, h))
    part.register_forward_pre_hook(lambda m, args: (args[0].sin(),))
    return part


@word(0.15)
def layer_with_functional_call(g: Grower, h: Tensor) -> Step | None:
    part = g.new(nn.Linear(h.shape[-1], g.size()))
    return lambda x: F.linear(x, part.weight, part.bias)


@word(0.2)
def twice(g: Grower, h: Tensor) -> Step | None:
    part = g.new(nn.Linear(h.shape[-1], h.shape[-1]))
    return lambda x: part(torch.tanh(part(x)))


@word(0.15)
def tied(g: Grower, h: Tensor) -> Step | None:
    a, b = (g.new(nn.Linear(h.shape[-1], h.shape[-1])) for _ in range(2))
    b.weight = a.weight
    return lambda x: b(torch.tanh(a(x)))


@word(0.15)
def tied_in_part(g: Grower, h: Tensor) -> Step | None:
    part = g.new(nn.Linear(h.shape[-1], g.size()))
    return lambda x: F.linear(torch.tanh(part(x)), part.weight.T)


# Norms


@word(5)
def norm(g: Grower, h: Tensor) -> Step | None:
    affine, channels, last = g.rng.random() < 0.75, h.shape[1], h.shape[-1]
    kind = g.rng.choice(["batch", "batch", "layer", "layer all", "group", "instance", "rms", "batch no stats"])
    if kind.startswith("batch"):
        g.held = True
        made = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d)[h.dim() - 2]
        return g.new(
            made(channels, affine=affine, track_running_stats=kind == "batch", momentum=g.rng.choice([0.1, None]))
        )
    if kind == "group":
        groups = [n for n in (1, 2, channels) if channels % n == 0 and h[0].numel() > n]  # of one number none is left
        return g.new(nn.GroupNorm(g.rng.choice(groups), channels, affine=affine)) if groups else None
    if kind == "instance":
        return (
            None if h.dim() < 3 else g.new((nn.InstanceNorm1d, nn.InstanceNorm2d)[h.dim() - 3](channels, affine=affine))
        )
    if kind == "rms":
        return g.new(nn.RMSNorm(last, elementwise_affine=affine))
    return g.new(
        nn.LayerNorm(last if kind == "layer" else h.shape[1:], elementwise_affine=affine, bias=g.rng.random() < 0.8)
    )


@word(0.3)
def norm_evaluated(g: Grower, h: Tensor) -> Step | None:
    made = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d)[h.dim() - 2](h.shape[1])
    part = g.new(made)
    return lambda x: part.eval()(x)
