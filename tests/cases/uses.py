"""Networks whose parameters are used as no layer of torch's does, or several times; each tells its voltages."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Tapped(nn.Module):
    """``self.tap(v)`` is said of every voltage: it is noted, cut from its history if asked for, and pushed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.cutting, self.pushes = False, list[Tensor]()

    def tap(self, v: Tensor) -> Tensor:
        """The voltage as it is handed on."""
        self.seen.append(v)
        v = v.detach() if self.cutting else v
        return v + self.pushes[len(self.seen) - 1] if self.pushes else v

    def forward(self, x: Tensor) -> Tensor:
        """The output."""
        self.seen = []
        return self.run(x)

    def run(self, x: Tensor) -> Tensor:
        """What is said in the subclass."""
        raise NotImplementedError


class Scaled(Tapped):
    """A gain a unit, a slope below zero, a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(6, 5), nn.Linear(5, 3), nn.PReLU(5)
        self.gain, self.log_scale = nn.Parameter(torch.rand(5) + 0.5), nn.Parameter(torch.tensor(0.3))

    def run(self, x: Tensor) -> Tensor:
        h = self.tap(self.act(self.tap(self.tap(self.a(x)) * self.gain)))
        return self.tap(self.tap(self.b(h)) * self.log_scale.exp())


class Bare(Tapped):
    """Weights without modules: a product from the right, a functional layer, einsum, a normalisation of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u, self.c = (nn.Parameter(torch.randn(s)) for s in ((6, 5), (4, 5), (4,)))
        self.v, self.g, self.shift = (nn.Parameter(torch.randn(s)) for s in ((3, 4), (4,), (3,)))

    def run(self, x: Tensor) -> Tensor:
        h = self.tap(F.linear(torch.tanh(self.tap(x @ self.w)), self.u, self.c))
        h = self.tap(h * torch.rsqrt(h.square().mean(1, keepdim=True) + 1e-3) * self.g)
        return self.tap(self.tap(torch.einsum("bi,oi->bo", torch.tanh(h), self.v)) + self.shift)


class Standardised(Tapped):
    """A convolution whose weight is standardised, and one that is weight-normed."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.d = nn.Conv2d(1, 3, 2), nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
        self.e = nn.Linear(4, 3)

    def run(self, x: Tensor) -> Tensor:
        w = self.c.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 0.1)
        h = self.tap(F.conv2d(x.view(-1, 1, 2, 3), w, self.c.bias)).flatten(1)
        return self.tap(self.e(torch.tanh(self.tap(self.d(torch.tanh(h))))))


class Recurrent(Tapped):
    """An Elman net unrolled: every layer but the last is used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.h, self.o = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def run(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 4)
        for part in x.chunk(3, dim=1):
            h = torch.tanh(self.tap(self.i(part)) + self.tap(self.h(h)))
        return self.tap(self.o(h))


class Siblings(Tapped):
    """One weight in two layers, and one layer given two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.c.weight, self.o = self.b.weight, nn.Linear(8, 3)

    def run(self, x: Tensor) -> Tensor:
        one, two = (torch.tanh(self.tap(self.a(part))) for part in x.chunk(2, dim=1))
        return self.tap(self.o(torch.tanh(torch.cat([self.tap(self.b(one)), self.tap(self.c(two))], 1))))


class Tokens(Tapped):
    """A class token and positions before attention that is written out, over three patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.qkv, self.out = nn.Linear(2, 4), nn.Linear(4, 12), nn.Linear(4, 3)
        self.token, self.place = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 4, 4))
        self.norm = nn.LayerNorm(4)

    def run(self, x: Tensor) -> Tensor:
        h = self.tap(self.patch(x.view(-1, 3, 2)))
        h = self.tap(torch.cat([self.tap(self.token.expand(len(h), -1, -1)), h], 1) + self.place)
        q, k, v = self.tap(self.qkv(self.tap(self.norm(h)))).chunk(3, dim=-1)
        h = h + F.scaled_dot_product_attention(q, k, v)
        return self.tap(self.out(h[:, 0]))


class Folded(Tapped):
    """Batch and words folded for products, as some language models have it, and a nonlinearity in pieces between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(2, 4), nn.Linear(4, 3), nn.Linear(3, 3)

    def run(self, x: Tensor) -> Tensor:
        words = x.view(-1, 3, 2)
        h = self.tap(self.a(words.reshape(-1, 2))).view(-1, 3, 4)
        h = 0.5 * h * (1 + torch.tanh(0.8 * (h + 0.04 * h.pow(3))))
        return self.tap(self.head(torch.tanh(self.tap(self.b(h.reshape(-1, 4)))).view(-1, 3, 3).mean(1)))


class Text(Tapped):
    """Embeddings of words and places, tied to the last layer; logits of every place."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.mix = nn.Embedding(5, 4), nn.Embedding(3, 4), nn.Linear(4, 4)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.words.weight

    def run(self, x: Tensor) -> Tensor:
        h = self.tap(self.tap(self.words(x)) + self.places(torch.arange(3, device=x.device)))
        h = h + torch.tanh(self.tap(self.mix(h))).cumsum(1)
        return self.tap(self.head(self.tap(self.norm(h)))).view(-1, 5)


class Tables(Text):
    """The same, where a module that is not called has the weight too, as language models keep one for both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(5, 4)
        self.shared.weight = self.words.weight


class Case(NamedTuple):
    """A network, what it is given, and what it is to answer."""

    make: Callable[[], Tapped]
    x: Callable[[], Tensor] = lambda: torch.randn(4, 6)
    y: Callable[[], Tensor] = lambda: torch.arange(4) % 3


CASES = {
    **{cls.__name__: Case(cls) for cls in (Scaled, Bare, Standardised, Recurrent, Siblings, Tokens, Folded)},
    **{
        cls.__name__: Case(cls, lambda: torch.randint(5, (4, 3)), lambda: torch.arange(12) % 5)
        for cls in (Text, Tables)
    },
}
