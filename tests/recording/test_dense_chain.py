"""Which networks are chains of dense layers, with their closed forms, and which are recorded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfc_lightning import DFC, ControlledNetwork
from dfc_lightning.settling import SteadyState


class Between(nn.Module):
    """Layers of 6-5-5-3, ``phi`` after the first two: a function of the voltage and the network's input."""

    def __init__(self, phi: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.phi = phi

    def forward(self, x: Tensor) -> Tensor:
        h = self.phi(self.a(x), x)
        return self.c(self.phi(self.b(h), x))


class Joined(Between):
    """As a whole another function of its layers and the input; ``phi`` is given the module."""

    def forward(self, x: Tensor) -> Tensor:
        return self.phi(self, x)


def module(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """``make()`` between the layers."""
    return lambda: nn.Sequential(nn.Linear(6, 5), make(), nn.Linear(5, 5), make(), nn.Linear(5, 3))


def function(phi: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Between(lambda v, x: phi(v))


def written(h: Tensor) -> Tensor:
    h = torch.tanh(h) * 1
    h[h.abs() > 0.7] = 0.0
    return h


DENSE: dict[str, Callable[[], nn.Module]] = {
    "nothing": function(lambda v: v),
    "tanh": module(nn.Tanh),
    "relu": module(nn.ReLU),
    "relu in place": module(lambda: nn.ReLU(inplace=True)),
    "hardtanh": module(nn.Hardtanh),
    "identity": module(nn.Identity),
    "gelu": module(nn.GELU),
    "frozen prelu": module(lambda: nn.PReLU().requires_grad_(False)),
    "two in a row": module(lambda: nn.Sequential(nn.Tanh(), nn.Softplus())),
    "flattened": module(nn.Flatten),
    "relu_": function(lambda v: v.relu_()),
    "functional relu in place": function(lambda v: F.relu(v, inplace=True)),
    "times one": function(lambda v: v.tanh() * 1),
    "shifted and scaled": function(lambda v: 2 * v.tanh() - 0.3),
    "swish by hand": function(lambda v: v * torch.sigmoid(v)),
    "where": function(lambda v: torch.where(v > 0, v, 0.2 * v)),
    "a mask of its own": function(lambda v: v * (v > 0)),
    "rational": function(lambda v: 1 - torch.sigmoid(2 / (v**2 + 1))),
    "clamped": function(lambda v: v.clamp(-0.5, 1.0)),
    "written into": function(written),
    "cloned": function(lambda v: v.clone().tanh()),
    "converted": function(lambda v: v.to(v.dtype).tanh()),
    "reshaped to and fro": function(lambda v: v.unsqueeze(1).tanh().squeeze(1)),
    "dropout of none": function(lambda v: F.dropout(v, 0.5, training=False).tanh()),
    "softmax at the end": lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3), nn.Softmax(1)),
    "a slope for each unit": lambda: Slopes(),
    "one layer": lambda: nn.Linear(6, 3),
}

RECORDED: dict[str, Callable[[], nn.Module]] = {
    "softmax": function(lambda v: v.softmax(1)),
    "less the mean of the units": function(lambda v: v - v.mean(1, keepdim=True)),
    "normalised": function(lambda v: v / v.norm(dim=1, keepdim=True)),
    "flipped units": function(lambda v: v.flip(1)),
    "rolled units": function(lambda v: v.roll(1, 1)),
    "picked units": function(lambda v: v[:, [1, 0, 2, 3, 4]]),
    "each unit by its neighbour": function(lambda v: v * v.roll(1, 1)),
    "gated by the input": lambda: Between(lambda v, x: v * x[:, :5]),
    "the input added": lambda: Between(lambda v, x: v + x[:, :5]),
    "a residual sum": lambda: Joined(lambda m, x: m.c((h := m.a(x)) + m.b(h.tanh()))),
    "two branches": lambda: Joined(lambda m, x: m.c(m.a(x) + m.b(x[:, :5]))),
    "two heads": lambda: Joined(lambda m, x: m.c(h := m.a(x).tanh()) + m.b(h)[:, :3]),
    "dropout": module(lambda: nn.Dropout(0.5)),
    "layer norm": module(lambda: nn.LayerNorm(5)),
    "batch norm": module(lambda: nn.BatchNorm1d(5)),
    "normalised input": lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)),
    "a frozen layer between": lambda: frozen(),
    "a convolution": lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 2, 2), nn.Flatten(), nn.Linear(4, 3)),
    "positions": lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Linear(3, 4), nn.Flatten(), nn.Linear(8, 3)),
}


class Slopes(nn.Module):
    """A slope of its own for each unit."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(6, 5), nn.Linear(5, 3)
        self.register_buffer("slope", torch.arange(1.0, 6.0).view(1, 5) / 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.a(x) * self.slope))


def frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3))
    net[1].requires_grad_(False)
    return net


def built(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


def batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(9, 6, generator=g, dtype=torch.float64), torch.arange(9) % 3


def update(net: ControlledNetwork, x: Tensor, y: Tensor, plasticity: str = "voltage_difference") -> list[Tensor]:
    net.module.zero_grad()
    with net.taught_by(DFC(settling=SteadyState(rtol=1e-11), target_stepsize=0.3, plasticity=plasticity)) as lesson:
        loss = F.cross_entropy(net(x), y)
    loss.backward()
    assert lesson.settled.converged.all()
    return [p.grad.clone() for p in net.module.parameters() if p.grad is not None]


ALIKE = [(name, plasticity) for name in DENSE for plasticity in ("voltage_difference", "rate_difference", "derivative")]


@pytest.mark.parametrize(("name", "plasticity"), ALIKE)
def test_a_chain_with_any_elementwise_functions_stays_dense_and_is_taught_alike(name, plasticity):
    module, (x, y) = built(DENSE[name]), batch()
    net, general = (ControlledNetwork(module, general=every, seed=0) for every in (False, True))
    forward = net.observe(x)
    assert type(forward).__name__ == "DensePass" and forward.dense and net.may_be_dense
    assert type(general.observe(x)).__name__ == "RecordedPass" and not general.may_be_dense
    general.load_state_dict(net.state_dict())
    for size in (1.0, 3.0):  # the second pass is watched as a known chain
        ours, theirs = (update(each, size * x, y, plasticity) for each in (net, general))
        assert len(ours) == len(theirs) == len(list(module.parameters())) - name.startswith("frozen prelu") * 2
        assert all((a - b).norm() <= 1e-10 * b.norm() for a, b in zip(ours, theirs))


@pytest.mark.parametrize("name", RECORDED)
def test_any_other_network_is_recorded(name):
    module, (x, y) = built(RECORDED[name]), batch()
    net = ControlledNetwork(module)
    forward = net.observe(x)
    assert type(forward).__name__ == "RecordedPass" and not forward.dense and not net.may_be_dense
    update(net, x, y)
    assert not net.observe(x).dense


class Summed(nn.Module):
    """Convolutions whose sum with a shortcut passes ``phi``."""

    def __init__(self, phi: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv1d(2, 3, 3, padding=1), nn.Conv1d(3, 3, 1), nn.Linear(9, 3)
        self.phi = phi

    def forward(self, x: Tensor) -> Tensor:
        h = self.phi(self.a(x.view(-1, 2, 3)))
        return self.c(self.phi(self.b(h) + h).flatten(1))


@pytest.mark.parametrize(
    ("by_hand", "known"),
    [
        (lambda v: v * torch.sigmoid(v), F.silu),
        (lambda v: torch.where(v > 0, v, 0.2 * v), lambda v: F.leaky_relu(v, 0.2)),
        (lambda v: v.clamp(0, 6), F.relu6),
        (lambda v: v * (v > 0), F.relu),
        (lambda v: torch.maximum(v, v * 0.2), lambda v: F.leaky_relu(v, 0.2)),
        (lambda v: torch.log(1 + torch.exp(v)), F.softplus),
    ],
    ids=["swish", "leaky", "clamp", "mask", "maximum", "softplus"],
)
def test_a_function_by_hand_is_taught_as_torchs_own(by_hand, known):
    (x, y), found = batch(), []
    for phi in (by_hand, known):
        found.append(update(ControlledNetwork(built(lambda: Summed(phi)), seed=0), x, y, "rate_difference"))  # noqa: B023
    assert all((a - b).norm() <= 1e-9 * b.norm() for a, b in zip(*found))


def test_a_voltage_that_others_hear_too_has_no_function_of_its_own():
    module = built(lambda: Joined(lambda m, x: m.c((h := m.a(x)) * torch.sigmoid(h) + m.b(h))))
    forward = ControlledNetwork(module).observe(batch()[0])
    assert torch.equal(forward.slopes[0], torch.ones_like(forward.v[0]))
