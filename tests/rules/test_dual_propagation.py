"""Dual propagation, against autograd with its difference in the place of the derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.chains import close
from torch import Tensor, nn

from dfc_lightning import ControlledNetwork, DualPropagation

PHI: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "tanh": torch.tanh, "gelu": F.gelu}


class _Dual(torch.autograd.Function):
    """A nonlinearity that hands errors on by its values to either side."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, name: str, nudge: float) -> Tensor:
        ctx.save_for_backward(v)
        ctx.of = PHI[name], nudge
        return PHI[name](v)

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> Any:
        (v,), (phi, nudge) = ctx.saved_tensors, ctx.of
        return (phi(v + nudge * error) - phi(v - nudge * error)) / (2 * nudge), None, None


class Net(nn.Module):
    """A convolution, a normalisation, max-pooling, a shortcut and dense layers."""

    def __init__(self, name: str, nudge: float | None = None) -> None:
        super().__init__()
        self.name, self.nudge = name, nudge
        self.c1, self.n1, self.c2 = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.a, self.b = nn.Linear(36, 6), nn.Linear(6, 3)

    def phi(self, v: Tensor) -> Tensor:
        return PHI[self.name](v) if self.nudge is None else _Dual.apply(v, self.name, self.nudge)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(self.phi(self.n1(self.c1(x))), 2)
        h = self.phi(h + self.c2(h))
        return self.b(self.phi(self.a(h.flatten(1))))


class Chain(Net):
    """Dense layers alone."""

    def __init__(self, name: str, nudge: float | None = None) -> None:
        nn.Module.__init__(self)
        self.name, self.nudge = name, nudge
        self.a, self.b, self.c = nn.Linear(72, 7), nn.Linear(7, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.phi(self.b(self.phi(self.a(x.flatten(1))))))


@pytest.mark.parametrize("kind", [Net, Chain])
@pytest.mark.parametrize("name", PHI)
@pytest.mark.parametrize("nudge", [0.01, 1.0, 30.0])
def test_errors_cross_nonlinearities_by_differences(kind, name, nudge):
    torch.manual_seed(0)
    module, x, y = kind(name).double(), torch.randn(5, 2, 6, 6, dtype=torch.float64), torch.arange(5) % 3
    twin = kind(name, nudge).double()
    twin.load_state_dict(module.state_dict())
    F.cross_entropy(twin(x), y, reduction="sum").backward()
    net = ControlledNetwork(module)
    with net.taught_by(DualPropagation(nudge)):
        loss = F.cross_entropy(net(x), y)
    loss.backward()
    mine, theirs = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (module, twin))
    assert close(mine, theirs / 5, 1e-9)
    module.zero_grad()
    F.cross_entropy(module(x), y).backward()
    true = torch.cat([p.grad.flatten() for p in module.parameters()])
    if nudge == 30.0:  # it is not backprop in disguise
        assert F.cosine_similarity(mine, true, dim=0) < 0.99
    elif nudge == 0.01 and name != "relu":
        assert close(mine, true, 1e-4)


@pytest.mark.parametrize("nudge", [0.0, -1.0, float("nan"), float("inf")])
def test_a_nudge_that_is_none_is_refused(nudge):
    with pytest.raises(ValueError, match=f"nudge={nudge}.*above zero"):
        DualPropagation(nudge)
