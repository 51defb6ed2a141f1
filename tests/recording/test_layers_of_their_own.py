"""Layers that do more than torch's own, and modules of any kind that are controlled as a whole."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfc_lightning import DFC, Backprop, ControlError, ControlledNetwork


class NormAct(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class ByHand(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return F.relu(y, inplace=True) * 0.5


class ChannelsLast(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Active(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x.square()))


class InPlace(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu_()


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight / self.weight.norm(), self.bias)


class Noisy(nn.Module):
    """Dropout, normalisation by the batch and a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)

    def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
        h = F.dropout(torch.tanh(self.norm(self.a(x))), 0.4, self.training)
        return self.b(h) * scale, h.mean(1)


class Of(nn.Module):
    """What ``run`` makes of a module, and a linear layer behind it."""

    def __init__(self, inner: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], width: int = 4) -> None:
        super().__init__()
        self.first, self.m, self.run, self.last = nn.Linear(6, 6), inner, run, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.run(self.m, torch.tanh(self.first(x))))


class Boxed(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"voltage": super().forward(x)}


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.ones(4))

    def forward(self) -> Tensor:
        return self.value


class Changing(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


def maps(norm: nn.Module, conv: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (2, 3, 1)), conv or nn.Conv2d(2, 4, 2, padding=1), norm, nn.Flatten(), nn.LazyLinear(3)
    )


FOLLOWED = {
    "norm and activation": lambda: maps(NormAct(4)),
    "norm called by hand": lambda: maps(ByHand(4)),
    "norm of channels last": lambda: maps(ChannelsLast(4)),
    "linear with both": lambda: nn.Sequential(Active(6, 5), nn.Linear(5, 4), Active(4, 3)),
    "linear, then in place": lambda: nn.Sequential(InPlace(6, 5), InPlace(5, 4), nn.Linear(4, 3)),
    "hooked": lambda: hooked(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))),
}
NAMED = {
    "norm and activation": (lambda: maps(NormAct(4)), "2"),
    "weight standardised": (lambda: maps(nn.Tanh(), Standardised(2, 4, 2, padding=1)), "1"),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3)),
        "0",
    ),
    "torch's own layer": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), "0"),
    "a tuple": (lambda: Of(Noisy(), lambda m, x: torch.tanh(m(x)[0])), "m"),
    "keywords": (lambda: Of(Noisy(), lambda m, x: torch.tanh(m(x=x, scale=x[:, :1])[0])), "m"),
}


def hooked(net: nn.Sequential) -> nn.Module:
    net[0].register_forward_hook(lambda m, args, output: torch.tanh(output))
    return net


def compare(net: nn.Module, extra: tuple[str, ...] = ()) -> None:
    """Gradients under Backprop() against autograd's, in the first pass and with what it has shown; DFC settles."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.arange(8) % 3
    net(x.float())
    net = net.double()

    def taught(run: Callable[[Tensor], Tensor]) -> Tensor:
        torch.manual_seed(5)  # of dropout
        return F.cross_entropy(run(x), y)

    plain = copy.deepcopy(net)
    taught(plain).backward()
    expected = [p.grad for p in plain.parameters()]
    buffers = {name: b.clone() for name, b in plain.named_buffers()}
    for seen in (False, True):
        ours = copy.deepcopy(net)
        controlled = ControlledNetwork(ours, extra_points=extra)
        if seen:
            controlled.observe(x)
        with controlled.taught_by(Backprop()):
            loss = taught(controlled)
        loss.backward()
        for p, e in zip(ours.parameters(), expected):  # that of a bias before a batch normalisation is none
            assert (p.grad - e).norm() <= 1e-10 * e.norm() + 1e-14
        assert all(torch.allclose(b.double(), buffers[name].double()) for name, b in ours.named_buffers())
    with controlled.taught_by(DFC()) as lesson:
        loss = taught(controlled)
    loss.backward()
    assert lesson.settled.converged.all()


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_layer_that_does_more_has_its_point_where_its_parameters_are_used(name):
    compare(FOLLOWED[name]())


@pytest.mark.parametrize("name", NAMED)
def test_a_named_module_is_called_as_it_likes(name):
    make, point = NAMED[name]
    compare(make(), (point,))


REFUSED = {
    "what is returned beside": (Noisy(), lambda m, x: (r := m(x))[0] * r[1][:, None], "beside its first tensor"),
    "no tensor returned": (Boxed(), lambda m, x: m(x)["voltage"], "returns dict"),
    "no tensor given": (Constant(), lambda m, x: x[:, :4] + m(), "without a tensor"),
    "changing": (Changing(), lambda m, x: m(x), "another result when it is called again"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_controlled_as_a_whole_is_refused_with_the_reason(name):
    module, run, message = REFUSED[name]
    controlled = ControlledNetwork(Of(module, run), extra_points=["m"])
    with pytest.raises(ControlError, match=message):
        controlled.observe(torch.randn(8, 6))
