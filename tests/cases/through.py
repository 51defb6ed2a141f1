"""Autograd of a network whose errors travel back through other weights than the ones it feeds forward with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Through(torch.autograd.Function):
    """A layer whose weight learns by its own input, and hands errors on through ``back``."""

    @staticmethod
    def forward(ctx: Any, call: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor, back: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(x, weight, bias, back)
        return call(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> Any:
        x, weight, bias, back = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            own = torch.autograd.grad(ctx.call(x, weight, bias), (weight, bias), error)
            passed_on = torch.autograd.grad(ctx.call(x, back, bias), x, error)
        return None, *passed_on, *own, None


class Swapped(nn.Module):
    """A linear or convolutional layer with other weights for its errors."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, back: Tensor) -> None:
        super().__init__()
        self.layer, self.back = layer, back

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        if isinstance(layer, nn.Linear):
            call: Callable[..., Tensor] = F.linear
        else:
            call = lambda x, w, b: F.conv2d(x, w, b, layer.stride, layer.padding, layer.dilation, layer.groups)  # noqa: E731
        return _Through.apply(call, x, layer.weight, layer.bias, self.back)


def swapped(module: nn.Module, names: Sequence[str], back: Sequence[Tensor]) -> nn.Module:
    """A copy of ``module`` whose layers ``names`` hand errors on through ``back``."""
    twin = copy.deepcopy(module)
    for name, weight in zip(names, back):
        parent, _, child = name.rpartition(".")
        setattr(twin.get_submodule(parent), child, Swapped(module.get_submodule(name), weight.detach().clone()))
    return twin


class Conv(nn.Module):
    """Convolutions with strides and groups, overlapping max-pooling, a dense head."""

    shape = (2, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2, groups=2)
        self.head = nn.Linear(54, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.c2(F.max_pool2d(F.relu(self.c1(x)), 3, 1, 1))).flatten(1))


class Residual(nn.Module):
    """A normalised block with a shortcut of its own, another without, and two heads."""

    shape = (2, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.c2, self.short = nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Conv2d(4, 6, 1, stride=2)
        self.c3, self.b = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 3)
        self.side = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.n1(self.c1(x)))
        h = F.silu(self.c2(h) + self.short(h))
        h = F.relu(h + self.c3(h)).mean((2, 3))
        return self.b(h) - 0.5 * self.side(torch.tanh(h))


class Mlp(nn.Sequential):
    """A chain of dense layers."""

    shape = (6,)

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Softplus(), nn.Linear(5, 3))


NETS: dict[str, Callable[[], nn.Module]] = {"mlp": Mlp, "conv": Conv, "residual": Residual}


def made(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, a batch and its labels."""
    torch.manual_seed(0)
    module = NETS[name]().double()
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module, torch.randn(5, *module.shape, dtype=torch.float64), torch.arange(5) % 3
