"""Every remedy that a refusal names is followed, and works: the module then learns exactly what backprop teaches it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfc_lightning import DFC, Backprop, ControlError, ControlledNetwork


class Via(nn.Module):
    """``forward`` is any function of the module and 8 samples of 6 numbers; the layers are 6-5-4-3."""

    def __init__(self, forward: Callable[..., Tensor], **more: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)
        for name, module in more.items():
            setattr(self, name, module)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Unused(nn.Module):
    """A parameter that the output does not depend on, one of the loss perhaps."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.gain = chain(nn.Tanh()), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Voltage(nn.Module):
    def __init__(self, inner: nn.Module, pick: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.inner, self.pick = inner, pick

    def forward(self, x: Tensor) -> Tensor:
        return self.pick(self.inner(x))


class InDict(nn.Linear):
    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"v": super().forward(x)}


def chain(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), *between, nn.Linear(5, 3))


def via(between: Callable[[Tensor], Tensor]) -> Via:
    return Via(lambda m, x: m.c(torch.tanh(m.b(between(m.a(x))))))


def changed(module: nn.Module, change: Callable[[Any], Any]) -> nn.Module:
    change(module)
    return module


def run_once(module: nn.Module) -> nn.Module:
    module(torch.randn(2, 6))
    return module


def frozen(module: nn.Module, *names: str) -> nn.Module:
    for name in names:
        found = dict(module.named_parameters()).get(name)
        (module.get_submodule(name) if found is None else found).requires_grad_(False)
    return module


def maps(conv: nn.Module, *before: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 2, 3)), *before, conv, nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))


def sequences(m: nn.Module, run: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    """A module between layers, called with 2 steps of 4 numbers."""

    def forward(net: Via, x: Tensor) -> Tensor:
        return net.c(torch.tanh(run(net.m, torch.stack([net.a(x)[:, :4], net.b(net.first(x))], 1))))

    return Via(forward, m=m, first=nn.Linear(6, 5))


class Case(NamedTuple):
    """What is refused, what is said of it, and a module, with arguments of the network, after each remedy."""

    refused: Callable[[], nn.Module]
    message: str
    remedies: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]]
    options: dict[str, Any] = {}


def noisy(h: Tensor) -> Tensor:
    return F.alpha_dropout(h, 0.5, True)


def half_in_place(h: Tensor) -> Tensor:
    h[:, :2].relu_()
    return h


def tracked() -> nn.Module:
    return nn.InstanceNorm1d(5, track_running_stats=True)


def statistics(m: Via, x: Tensor) -> Tensor:
    return m.c(torch.tanh(m.b(m.n(torch.stack([m.a(x), x[:, :5]], 2)).sum(2))))


def encoder(dropout: float) -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout, batch_first=True)
    layer.self_attn.dropout = 0.0 if dropout else layer.self_attn.dropout
    return sequences(layer, lambda m, h: m(h).mean(1))


CASES = {
    "a parameter outside": Case(
        Unused,
        r"layers gain were not run.*Freeze.*network=",
        {"network": (Unused, {"network": "net"}), "freeze": (lambda: frozen(Unused(), "gain"), {})},
    ),
    "lazy": Case(
        lambda: nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.Linear(5, 3)),
        "Run one batch",
        {"run": (lambda: run_once(nn.Sequential(nn.LazyLinear(5), nn.Linear(5, 3))), {})},
    ),
    "an even kernel": Case(
        lambda: maps(nn.Conv2d(1, 2, 2, padding="same")),
        "nn.ZeroPad2d",
        {"pad": (lambda: maps(nn.Conv2d(1, 2, 2), nn.ZeroPad2d((0, 1, 0, 1))), {})},
    ),
    "random numbers": Case(
        lambda: via(noisy),
        "nn.Dropout.*take it out",
        {"nn.Dropout": (lambda: chain(nn.Dropout(0.5)), {}), "out": (lambda: via(torch.tanh), {})},
    ),
    "dropout of attention": Case(
        lambda: sequences(nn.TransformerEncoderLayer(4, 2, 8, 0.1, batch_first=True), lambda m, h: m(h).mean(1)),
        "attention or recurrent layer to 0",
        {
            "none": (lambda: encoder(0.0), {"extra_points": ["m"]}),
            "none of attention": (lambda: encoder(0.1), {"extra_points": ["m"]}),
        },
        {"extra_points": ["m"]},
    ),
    "a recurrent layer's state": Case(
        lambda: sequences(nn.LSTM(4, 4, batch_first=True), lambda m, h: m(h)[1][0][-1]),
        r"output\[:, -1\] of an LSTM.*module that returns what is needed, and name that",
        {
            "the last output": (
                lambda: sequences(nn.LSTM(4, 4, batch_first=True), lambda m, h: m(h)[0][:, -1]),
                {"extra_points": ["m"]},
            ),
            "from a module": (
                lambda: sequences(Voltage(nn.LSTM(4, 4, batch_first=True), lambda r: r[1][0][-1]), lambda m, h: m(h)),
                {"extra_points": ["m"]},
            ),
        },
        {"extra_points": ["m"]},
    ),
    "a dict returned": Case(
        lambda: sequences(InDict(4, 4), lambda m, h: m(h)["v"].mean(1)),
        "returns dict.*call it from a module",
        {
            "from a module": (
                lambda: sequences(Voltage(InDict(4, 4), lambda r: r["v"]), lambda m, h: m(h).mean(1)),
                {"extra_points": ["m"]},
            )
        },
        {"extra_points": ["m"]},
    ),
    "a detach": Case(
        lambda: via(lambda h: h + torch.sign(h).detach()),
        "Take it out, .* or freeze the layers before",
        {
            "out": (lambda: via(lambda h: h + 1), {}),
            "freeze": (lambda: frozen(via(lambda h: h + torch.sign(h).detach()), "a"), {}),
        },
    ),
    "complex numbers": Case(
        lambda: via(lambda h: h + torch.fft.fft(h).real),
        "real ones, or freeze the layers before",
        {
            "real": (lambda: via(lambda h: h + h @ torch.ones(5, 5).cos().to(h)), {}),
            "freeze": (lambda: frozen(via(lambda h: h + torch.fft.fft(h).real), "a"), {}),
        },
    ),
    "a view overwritten": Case(
        lambda: via(half_in_place),
        "not in place",
        {"not in place": (lambda: via(lambda h: torch.cat([h[:, :2].relu(), h[:, 2:]], 1)), {})},
    ),
    "written outside": Case(
        lambda: Via(statistics, n=tracked()),
        "Leave out=… away, and track_running_stats",
        {"untracked": (lambda: Via(statistics, n=nn.InstanceNorm1d(5)), {})},
    ),
    "samples mixed": Case(
        lambda: via(lambda h: h - h.mean(0)),
        r"reduces dimension 0.*x\.shape\[0\].*freeze the layers before",
        {
            "freeze": (lambda: frozen(via(lambda h: h - h.mean(0)), "a"), {}),
        },
    ),
    "a layer not run": Case(
        lambda: Via(lambda m, x: m.b(torch.tanh(m.a(x)))),
        "layers c were not run.*Freeze.*network=",
        {
            "freeze": (lambda: frozen(Via(lambda m, x: m.b(torch.tanh(m.a(x)))), "c"), {}),
            "network": (lambda: Via(lambda m, x: m.n(x), n=chain(nn.Tanh())), {"network": "n"}),
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_and_the_remedies_are_named(name):
    case = CASES[name]
    torch.manual_seed(0)
    with pytest.raises(ControlError, match=case.message):
        ControlledNetwork(case.refused(), **case.options).observe(torch.randn(8, 6))


@pytest.mark.parametrize("name,remedy", [(name, remedy) for name, case in CASES.items() for remedy in case.remedies])
def test_the_remedy_works(name, remedy):
    make, options = CASES[name].remedies[remedy]
    torch.manual_seed(0)
    net = make().double()
    net(torch.randn(8, 6, dtype=torch.float64))
    x = torch.randn(8, 6, dtype=torch.float64)
    y = torch.arange(8) % 3
    plain = copy.deepcopy(net)
    controlled = ControlledNetwork(net, **options)

    def loss(run: Callable[[Tensor], Tensor]) -> Tensor:
        torch.manual_seed(1)  # of dropout
        return F.cross_entropy(run(x), y)

    loss(plain).backward()
    with controlled.taught_by(Backprop()):
        found = loss(controlled)
    found.backward()
    for ours, theirs in zip(net.parameters(), plain.parameters()):
        assert (ours.grad is None) == (theirs.grad is None)
        assert theirs.grad is None or (ours.grad - theirs.grad).norm() <= 1e-10 * theirs.grad.norm() + 1e-14
    with controlled.taught_by(DFC()) as lesson:
        found = loss(controlled)
    found.backward()
    assert lesson.settled.converged.all()
