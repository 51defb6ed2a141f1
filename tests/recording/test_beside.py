"""Calls of the network beside the one that is taught: for the gradient by its input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dfc_lightning import DFC, Backprop, ControlError, ControlledNetwork

Loss = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]


def input_gradient(f: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(f(x), y), x)[0]


def adversarial(f: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f(x + 0.1 * input_gradient(f, x, y).sign()), y)


def by_backward(f: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    delta = torch.zeros_like(x, requires_grad=True)
    F.cross_entropy(f(x + delta), y).backward()
    return F.cross_entropy(f(x + 0.1 * delta.grad.sign()), y)


def projected(f: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    moved = x
    for _ in range(3):
        moved = moved + 0.05 * input_gradient(f, moved, y).sign()
    return F.cross_entropy(f(moved), y)


def salient(f: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(f(x), y)
    return loss * (1 + input_gradient(f, x, y).abs().mean().detach())


def penalised(f: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    wanting = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(f(wanting).sum(), wanting, create_graph=True)
    return F.cross_entropy(f(x), y) + slope.square().sum()


def joined(f: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    wanting = x.clone().requires_grad_()
    return F.cross_entropy(f(x), y) + F.cross_entropy(f(wanting), y)


FOLLOWED: dict[str, Loss] = {
    "fast gradient sign": adversarial,
    "by backward()": by_backward,
    "several steps": projected,
    "saliency afterwards": salient,
}
REFUSED: dict[str, tuple[Loss, str]] = {
    "gradient penalty": (penalised, "whose input wants a gradient, or on that gradient"),
    "its loss too": (joined, "whose input wants a gradient"),
    "no other call": (lambda f, x, y: F.cross_entropy(f(x.clone().requires_grad_()), y), r"only with.*detach\(\)"),
    "not detached": (
        lambda f, x, y: F.cross_entropy(f((z := x.clone().requires_grad_()) - 0.1 * input_gradient(f, z, y)), y),
        r"only with an input that wants a gradient.*detach\(\)",
    ),
}
NETS: dict[str, Callable[[], nn.Module]] = {
    "chain": lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)),
    "piecewise linear": lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)),
    "one layer": lambda: nn.Linear(6, 3),
    "normalised": lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 3)),
    "maps": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3), nn.Softplus(), nn.Flatten(), nn.Linear(8, 3)
    ),
}


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 6), torch.randint(3, (8,))


@pytest.fixture(params=NETS)
def module(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return NETS[request.param]()


@pytest.mark.parametrize("name", FOLLOWED)
@pytest.mark.parametrize("seen", [False, True], ids=["first pass", "later pass"])
def test_a_call_for_the_gradient_by_the_input_is_left_to_autograd(module, name, seen):
    x, y = batch()
    net = ControlledNetwork(module)
    if seen:
        net.observe(x)
    with net.taught_by(Backprop()):
        loss = FOLLOWED[name](net, x, y)
    module.zero_grad()  # as the trainer does
    loss.backward()
    found = [p.grad.clone() for p in module.parameters()]
    true_loss = FOLLOWED[name](module, x, y)
    module.zero_grad()
    true_loss.backward()
    assert torch.allclose(loss, true_loss)
    assert all(torch.allclose(g, p.grad, 1e-4, 1e-6) for g, p in zip(found, module.parameters(), strict=True))


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("seen", [False, True], ids=["first pass", "later pass"])
def test_nothing_else_learns_of_it_in_silence(module, name, seen):
    loss, message = REFUSED[name]
    x, y = batch()
    net = ControlledNetwork(module)
    if seen:
        net.observe(x)
    with pytest.raises(ControlError, match=message):
        with net.taught_by(DFC()):
            found = loss(net, x, y)
        found.backward()


def detached_penalty(f: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f(x), y) + input_gradient(f, x, y).square().sum().detach()


def detached_input(f: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    z = x.clone().requires_grad_()
    return F.cross_entropy(f((z - 0.1 * input_gradient(f, z, y)).detach()), y)


@pytest.mark.parametrize("remedy", [detached_penalty, detached_input])
def test_what_the_errors_ask_for_helps(module, remedy):
    x, y = batch()
    net = ControlledNetwork(module)
    with net.taught_by(DFC()):
        loss = remedy(net, x, y)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("seen", [False, True], ids=["first pass", "later pass"])
def test_a_call_without_gradients_alone_teaches_nothing(general, seen):
    net, (x, _) = ControlledNetwork(NETS["chain"](), general=general), batch()
    if seen:
        net.observe(x)
    with pytest.raises(ControlError, match=r"layers 0, 2 were called without gradients only.*out of no_grad\(\)"):
        with net.taught_by(DFC()), torch.no_grad():
            net(x)
    with net.taught_by(DFC()):
        net(x)


class Checkpointed(nn.Sequential):
    """The first layer is run again on the way back."""

    reentrant = True

    def forward(self, x: Tensor) -> Tensor:
        return self[2](self[1](checkpoint(self[0], x, use_reentrant=self.reentrant)))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_layers_may_be_checkpointed_as_the_error_says():
    module, (x, _) = Checkpointed(*NETS["chain"]()), batch()
    net = ControlledNetwork(module)
    with pytest.raises(ControlError, match="layers 0 were called without gradients only.*use_reentrant=False"):
        net.observe(x)
    module.reentrant = False
    with net.taught_by(Backprop()):
        loss = net(x).square().sum()
    loss.backward()
    found = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    module(x).square().sum().backward()
    assert all(torch.allclose(g, p.grad, 1e-4, 1e-6) for g, p in zip(found, module.parameters(), strict=True))
