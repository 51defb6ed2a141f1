"""Networks written in unusual ways: each is followed exactly, or refused with a reason."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases.chains import close
from torch import Tensor, nn

from dfc_lightning import DFC, Backprop, ControlError, ControlledNetwork
from dfc_lightning.settling import SteadyState


class Two(nn.Module):
    """A layer, anything, a layer."""

    def __init__(self, between: Callable[[Tensor], Tensor], width: int = 7, after: Callable | None = None) -> None:
        super().__init__()
        self.a, self.b, self.between, self.after = nn.Linear(5, 7), nn.Linear(width, 3), between, after

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        out = self.b(self.between(h))
        return out if self.after is None else self.after(out, h)


def written(h: Tensor) -> Tensor:
    h = torch.tanh(h) * 1
    h[h.abs() > 0.7] = 0.0
    return h


def filled(h: Tensor) -> Tensor:
    buffer = torch.zeros(len(h), 9, dtype=h.dtype)
    buffer[:, 1:8] = torch.tanh(h)
    return buffer


MASK = torch.arange(6).remainder(2).bool().unsqueeze(1)
FOLLOWED: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "a mask of its own": (lambda h: h * (h > 0), 7),
    "where": (lambda h: torch.where(h > 0, h, 0.2 * h), 7),
    "masked fill": (lambda h: h.masked_fill(MASK[: len(h)], 0.0), 7),
    "written into": (written, 7),
    "written into a buffer": (filled, 9),
    "scalars on the left": (lambda h: 1 - torch.sigmoid(2 / (h.square() + 1)), 7),
    "keywords": (lambda h: torch.mul(input=torch.add(input=h, other=h.tanh()), other=h), 7),
    "expand": (lambda h: h.tanh() + h.mean(1, keepdim=True).expand(h.shape[0], 7), 7),
    "indices": (lambda h: h.gather(1, h.argsort(1)[:, :4]), 4),
    "top values": (lambda h: h.topk(3, dim=1).values, 3),
    "swish by hand": (lambda h: h * torch.sigmoid(h), 7),
    "softmax": (lambda h: h.softmax(1) * h, 7),
    "normalised by itself": (lambda h: h / h.norm(dim=1, keepdim=True), 7),
    "in place": (lambda h: (h * 1.0).mul_(2).add_(1).relu_(), 7),
    "leaky, in place": (lambda h: F.leaky_relu_(h * 1.0, 0.2), 7),
    "dropout not in training": (lambda h: torch.dropout(h, 0.5, False).tanh(), 7),
    "alpha dropout not in training": (lambda h: F.alpha_dropout(h, 0.5, False).tanh(), 7),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_is_followed_is_followed_exactly(name):
    between, width = FOLLOWED[name]
    torch.manual_seed(0)
    net = Two(between, width).double()
    controlled = ControlledNetwork(net, general=True)
    for x in (torch.randn(6, 5, dtype=torch.float64) * scale for scale in (0.3, 3.0)):
        y = torch.arange(6) % 3
        plain = copy.deepcopy(net)
        F.cross_entropy(plain(x), y).backward()
        net.zero_grad()
        with controlled.taught_by(Backprop()):
            loss = F.cross_entropy(controlled(x), y)
        loss.backward()
        for ours, theirs in zip(net.parameters(), plain.parameters()):
            assert (ours.grad - theirs.grad).norm() <= 1e-10 * theirs.grad.norm() + 1e-14
        forward = controlled.observe(x)
        apical = [torch.randn(6, n, dtype=torch.float64) for n in forward.widths]
        pushed = net.b(between(net.a(x) + apical[0])) + apical[1]
        assert close(forward.respond(apical).output, pushed - net(x), 1e-9)


class Between(nn.Module):
    """A chain with anything between its layers, which may know the module."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Linear(5, 7), nn.Linear(7, 3), between
        self.register_buffer("sharpness", torch.ones(()))
        self.scale, self.norm = 1.0, nn.BatchNorm1d(7, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self, self.a(x)))


CHANGED: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "a number of the data": lambda m, h: h.tanh() * float(h.detach().abs().max()),
    "an attribute": lambda m, h: torch.tanh(h * m.scale),
    "a branch": lambda m, h: h.tanh() if m.scale == 1 else h.relu(),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_chain_whose_function_has_changed_is_refused(name):
    module = Between(CHANGED[name]).requires_grad_(True)
    network, x = ControlledNetwork(module), torch.randn(6, 5)
    network.observe(x)
    network.observe(x)
    module.scale = 2.0
    with pytest.raises(ControlError, match="between the layers 'a' and 'b' is another function"):
        network.observe(2 * x)


def test_a_chain_follows_a_buffer_that_is_written_in_place():
    """What the refusal of a changed function advises."""
    module = Between(lambda m, h: torch.tanh(h * m.sharpness)).double()
    network, x, y = ControlledNetwork(module), torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 3
    for sharpness in (1.0, 2.0, 0.5):
        module.sharpness.fill_(sharpness)
        module.zero_grad()
        F.cross_entropy(module(x), y).backward()
        plain = [module.a.weight.grad.clone(), module.b.weight.grad.clone()]
        module.zero_grad()
        with network.taught_by(Backprop()):
            loss = F.cross_entropy(network(x), y)
        loss.backward()
        assert close(module.a.weight.grad, plain[0], 1e-10) and close(module.b.weight.grad, plain[1], 1e-10)
    assert network.may_be_dense


def test_statistics_move_once_a_step_where_a_norm_without_weights_lies_between_dense_layers():
    module = Between(lambda m, h: m.norm(h).tanh())
    network, x = ControlledNetwork(module), torch.randn(6, 5)
    twin = copy.deepcopy(module)
    for _ in range(2):
        twin(x)
        with network.taught_by(Backprop()):
            loss = F.cross_entropy(network(x), torch.arange(6) % 3)
        loss.backward()
    assert torch.allclose(module.norm.running_mean, twin.norm.running_mean)
    assert module.norm.num_batches_tracked == 2


@pytest.mark.parametrize("batch", [4, 5])
def test_a_shape_may_name_the_batch_size_or_leave_single_dimensions_out(batch):
    """A sample by itself, or two errors for each, are other numbers of rows."""
    for module in (Between(lambda m, h: h.view(batch, 7).sin()), Between(lambda m, h: h.unsqueeze(1).squeeze())):
        network = ControlledNetwork(module)
        with network.taught_by(DFC()) as lesson:
            loss = F.cross_entropy(network(torch.randn(batch, 5)), torch.arange(batch) % 3)
        loss.backward()
        assert lesson.settled.converged.all()
        assert lesson.forward.samples(torch.tensor([0])).jacobians()[0].shape == (1, 3, 7)


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("looked_at", [torch.detach, lambda h: h], ids=["detached", "as it is"])
def test_hidden_activity_may_be_looked_at(looked_at, general):
    seen: list[float] = []

    def look(out: Tensor, h: Tensor) -> Tensor:
        seen.append(float(looked_at(h).norm().detach()))
        return out

    net = ControlledNetwork(Two(torch.tanh, after=look), general=general)
    with net.taught_by(DFC()):
        loss = F.cross_entropy(net(torch.randn(6, 5)), torch.arange(6) % 3)
    loss.backward()
    assert len(seen) == 1 and seen[0] > 0 and net.module.a.weight.grad.any()


def test_a_buffer_as_long_as_the_batch_is_no_batch():
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)
            self.register_buffer("place", torch.randn(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x) + self.place).mean(1))

    net = ControlledNetwork(Positions())
    for batch in (8, 6):
        with net.taught_by(DFC()) as lesson:
            loss = F.cross_entropy(net(torch.randn(batch, 6, 5)), torch.arange(batch) % 3)
        loss.backward()
        assert lesson.settled.converged.all()


class Bilinear(nn.Module):
    """A layer of nobody's kind: a product of two linear maps."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) * self.right(x)


def test_a_named_module_is_a_point_as_a_whole():
    torch.manual_seed(0)
    net = nn.Sequential(Bilinear(), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 3
    controlled = ControlledNetwork(net, extra_points=["0"])
    with controlled.taught_by(Backprop()):
        loss = F.cross_entropy(controlled(x), y)
    loss.backward()
    ours = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    F.cross_entropy(net(x), y).backward()
    assert [p.name for p in controlled.points] == ["0", "2"]
    assert all(close(a, p.grad, 1e-10) for a, p in zip(ours, net.parameters()))
    net.zero_grad()
    with controlled.taught_by(DFC(settling=SteadyState(rtol=1e-11), target_stepsize=0.3)) as lesson:
        loss = F.cross_entropy(controlled(x), y)
    loss.backward()
    u, q = lesson.settled.control, controlled.feedback[0].detach()
    v = net[0](x).detach()
    signal = torch.tanh(v + u @ q.T) - torch.tanh(v)  # Eq. (5), whatever the layer
    leaves = list(net[0].parameters())
    expected = torch.autograd.grad(net[0](x), leaves, signal)
    assert all(close(p.grad, -e / (0.3 * 6), 1e-9) for p, e in zip(leaves, expected))
    with pytest.raises(ControlError, match=r"'9' is no submodule"):
        ControlledNetwork(net, extra_points=["9"])
