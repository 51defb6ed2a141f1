"""Elementwise functions in all the ways they can be written, and dropout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cases.grammar import Grower, Step, Words

WORDS = Words()
word, one_of = WORDS.word, WORDS.one_of


# Elementwise functions


@word(9)
def function(g: Grower, h: Tensor) -> Step | None:
    made = [nn.ReLU(), nn.ReLU(inplace=True), nn.Tanh(), nn.Sigmoid(), nn.ELU(), nn.GELU(), nn.SiLU(inplace=True)]
    made += [nn.Softplus(), nn.LeakyReLU(0.2), nn.Hardtanh(), nn.Mish(), nn.Hardswish(), nn.CELU(inplace=True)]
    made += [nn.Softsign(), nn.LogSigmoid(), nn.Tanhshrink(), nn.Threshold(0.1, 0.2), nn.GELU("tanh"), nn.SELU()]
    made += [nn.Softmax(1), nn.GLU(1), nn.LogSoftmax(-1), nn.PReLU().requires_grad_(False), nn.Softmin(-1)]
    return g.pick_part(made)


@word(0.1)
def learned_slope(g: Grower, h: Tensor) -> Step | None:
    return g.new(nn.PReLU())


one_of(
    "functional",
    3,
    F.relu,
    torch.tanh,
    torch.sigmoid,
    F.silu,
    torch.sin,
    lambda h: F.elu(h, 0.5),
    torch.exp,
    F.softsign,
    torch.erf,
    torch.atan,
)
one_of(
    "in place",
    2.5,
    lambda h: h.relu_(),
    lambda h: torch.tanh_(h),
    lambda h: h.mul_(2).add_(1),
    lambda h: F.leaky_relu_(h, 0.1),
    lambda h: h.clamp_(-1, 1),
    lambda h: h.add_(h.sin()),
    lambda h: h.sub_(h.mean(-1, keepdim=True)),
    lambda h: h.clone().zero_().add_(h),
)
one_of(
    "by hand",
    6,
    lambda h: h * torch.sigmoid(1.7 * h),
    lambda h: h / (1 + h.abs()),
    lambda h: torch.where(h > 0, h, 0.1 * h),
    lambda h: h * (h > 0),
    lambda h: (h > 0).to(h) * h,
    lambda h: h.clamp(min=0),
    lambda h: torch.clamp(h, -0.5, 0.7),
    lambda h: torch.maximum(h, 0.1 * h),
    lambda h: torch.log1p(h.exp()),
    lambda h: h.square() + h,
    lambda h: h**3 - h,
    lambda h: 1 - h,
    lambda h: 2 / (h**2 + 1),
    lambda h: -h,
    lambda h: h.abs().sqrt() * h.sign(),
    lambda h: torch.lerp(h, h.tanh(), 0.3),
    lambda h: torch.addcmul(h, h.tanh(), h.sigmoid(), value=0.5),
    lambda h: h.relu() - (-h).relu(),
    lambda h: torch.stack([h, -h]).amax(0),
    lambda h: h @ torch.eye(h.shape[-1], dtype=h.dtype).roll(1, 0),
    lambda h: torch.round(h) + h,
    lambda h: h + torch.linspace(0, 1, h.shape[-1], dtype=h.dtype),
    lambda h: h * torch.ones_like(h).cumsum(1),
    lambda h: h + torch.zeros(len(h), 1, dtype=h.dtype).view(-1, *[1] * (h.dim() - 1)),
    lambda h: torch.einsum("b...i,b...i->b...i", h, h.tanh()),
    lambda h: h.where(h.abs() < 1, h.sign()),
    lambda h: torch.fmod(h, 1.3),
    lambda h: h.logaddexp(-h),
    lambda h: torch.hypot(h, h.new_ones(())),
)


# Dropout


@word(2.5)
def dropout(g: Grower, h: Tensor) -> Step | None:
    g.held = True
    made = [nn.Dropout(0.4), nn.Dropout(0.3, inplace=True), nn.Dropout(0.0), nn.Dropout(0.5)]
    made += [[nn.Dropout1d(0.4)], [nn.Dropout2d(0.4)]][h.dim() - 3] if h.dim() > 2 else []
    return g.pick_part(made)


one_of("functional dropout", 0.5, F.dropout, lambda h: F.dropout(h, 0.3, False), lambda h: torch.dropout(h, 0.3, True))
one_of(
    "noise",
    0.3,
    lambda h: F.alpha_dropout(h, 0.3, True),
    lambda h: h + 0.1 * torch.randn_like(h),
    lambda h: h * torch.rand(h.shape, dtype=h.dtype),
    lambda h: h + torch.normal(h, 1.0),
)
