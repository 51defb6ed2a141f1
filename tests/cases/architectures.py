"""Networks that can be controlled, written in many ways, and their gradients by autograd and by a rule."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfc_lightning import ControlledNetwork


class Functional(nn.Module):
    """Layers registered in another order than called, nonlinearities as functions."""

    def __init__(self, phi: Callable[[Tensor], Tensor], bias: bool = True) -> None:
        super().__init__()
        self.phi = phi
        self.last = nn.Linear(4, 3, bias=bias)
        self.first = nn.Linear(6, 5, bias=bias)
        self.middle = nn.Linear(5, 4, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.phi(self.middle(self.phi(self.first(x)))))


class Chained(nn.Sequential):
    """Linear layers with a module between each two."""

    def __init__(self, phi: Callable[[], nn.Module], *last: nn.Module) -> None:
        super().__init__(nn.Linear(6, 5), phi(), nn.Linear(5, 4), phi(), nn.Linear(4, 3), *last)


class ByName(Chained):
    """Passes the input of its layers by name."""

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = module(input=x)
        return x


def frozen(index: int) -> nn.Module:
    net = Chained(nn.Tanh)
    net[index].requires_grad_(False)
    return net


def frozen_bias() -> nn.Module:
    net = Chained(nn.Tanh)
    net[2].bias.requires_grad_(False)
    return net


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "one layer": lambda: nn.Linear(6, 3),
    "nested": lambda: nn.Sequential(
        nn.Flatten(), nn.Sequential(nn.Linear(6, 5), nn.Tanh()), nn.Sequential(nn.Sequential(nn.Linear(5, 3)))
    ),
    "functional tanh": lambda: Functional(torch.tanh),
    "functional relu": lambda: Functional(F.relu),
    "method sigmoid": lambda: Functional(lambda v: v.sigmoid()),
    "x sigmoid(x)": lambda: Functional(lambda v: v * torch.sigmoid(v)),
    "where": lambda: Functional(lambda v: torch.where(v > 0, v, 0.1 * v)),
    "shifted": lambda: Functional(lambda v: 2 - torch.exp(-(v**2)) / 3),
    "leaky_relu with a slope": lambda: Functional(lambda v: F.leaky_relu(v, negative_slope=0.3)),
    "linear": lambda: Functional(lambda v: v),
    "no bias": lambda: Functional(torch.tanh, bias=False),
    "in-place method": lambda: Functional(lambda v: v.tanh_()),
    "in-place function": lambda: Functional(lambda v: F.relu(v, inplace=True)),
    "in-place relu": lambda: Chained(lambda: nn.ReLU(inplace=True)),
    "in-place leaky_relu": lambda: Chained(lambda: nn.LeakyReLU(0.2, inplace=True)),
    "in-place elu": lambda: Chained(lambda: nn.ELU(inplace=True)),
    "elu": lambda: Chained(nn.ELU),
    "gelu": lambda: Chained(nn.GELU),
    "silu": lambda: Chained(nn.SiLU),
    "softplus": lambda: Chained(nn.Softplus),
    "hardtanh": lambda: Chained(nn.Hardtanh),
    "softsign": lambda: Chained(nn.Softsign),
    "identity": lambda: Chained(nn.Identity),
    "two in a row": lambda: Chained(lambda: nn.Sequential(nn.Tanh(), nn.Softplus())),
    "by name": lambda: ByName(nn.Tanh),
    "log_softmax last": lambda: Chained(nn.Tanh, nn.LogSoftmax(1)),
    "softmax last": lambda: Chained(nn.Tanh, nn.Softmax(1)),
    "tanh last": lambda: Chained(nn.Tanh, nn.Tanh()),
    "in-place relu last": lambda: Chained(nn.Tanh, nn.ReLU(inplace=True)),
    "frozen first layer": lambda: frozen(0),
    "frozen last layer": lambda: frozen(4),
    "frozen bias": frozen_bias,
}


def made(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return ARCHITECTURES[name]().to(dtype)


def batch(size: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(size, 6, generator=g).to(dtype), torch.randint(3, (size,), generator=g)


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def by_autograd(module: nn.Module, x: Tensor, y: Tensor, loss: Any = F.cross_entropy) -> nn.Module:
    twin = copy.deepcopy(module)
    loss(twin(x), y).backward()
    return twin


def taught(
    module: nn.Module, rule: Any, x: Tensor, y: Tensor, loss: Any = F.cross_entropy, **options: Any
) -> nn.Module:
    module.zero_grad()
    net = ControlledNetwork(module, **options)
    with net.taught_by(rule):
        value = loss(net(x), y)
    value.backward()
    return module
