"""The network's output where it is no matrix: maps, tokens, several heads, and what a loss takes beside a matrix."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from dfc_lightning import DFC, Backprop, ControlError, ControlledNetwork, LayeredDFC


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.head = nn.Conv2d(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([torch.relu(self.up(torch.relu(self.down(x)))), x], 1))


class Words(nn.Module):
    def __init__(self, time_first: bool = False) -> None:
        super().__init__()
        self.words, self.reads, self.head = nn.Embedding(7, 4), nn.GRU(4, 4), nn.Linear(4, 7)
        self.time_first = time_first

    def forward(self, x: Tensor) -> Tensor:
        found = self.head(self.reads(self.words(x).transpose(0, 1))[0])
        return found if self.time_first else found.transpose(0, 1)


class Heads(nn.Module):
    """Two heads, with something that has no part in them."""

    def __init__(self, pack: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body, self.one, self.two, self.pack = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(5, 2), pack

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.body(x))
        return self.pack(self.one(h), self.two(h), x)


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), nn.Linear(2, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return self.decoder(mean + torch.exp(log_variance / 2) * torch.randn_like(mean)), mean, log_variance


class Encoded(Words):
    """Returns the encoder's states too; has its table in a module that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(7, 4)
        self.shared.weight = self.words.weight

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        states = self.reads(self.words(x).transpose(0, 1))[0].transpose(0, 1)
        return {"logits": self.head(states), "states": states}


class Pair(NamedTuple):
    one: Tensor
    two: Tensor


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    x: Tensor
    loss: Callable[[Any], Tensor]
    n_outputs: int
    options: dict[str, Any] = {}


generator = torch.Generator().manual_seed(0)
VECTORS = torch.randn(4, 6, generator=generator, dtype=torch.float64)
MAPS = torch.randn(4, 1, 8, 8, generator=generator, dtype=torch.float64)
TEXT, NEXT = (torch.randint(7, (4, 5), generator=generator) for _ in range(2))
KINDS = torch.randint(3, (4, 8, 8), generator=generator)
LABELS = torch.arange(4) % 2


def both(found: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(found[0], LABELS) + 0.3 * F.cross_entropy(found[1], LABELS)


def evidence(found: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    again, mean, log_variance = found
    return (again - VECTORS).square().mean() + (mean.square() + log_variance.exp() - log_variance).mean()


CASES = {
    "maps": Case(UNet, MAPS, lambda v: F.cross_entropy(v, KINDS), 192),
    "maps, a loss of one's own": Case(UNet, MAPS, lambda v: (v - 1).square().mean(), 192),
    "tokens": Case(Words, TEXT, lambda v: F.cross_entropy(v.flatten(0, 1), NEXT.flatten()), 35),
    "tokens, classes second": Case(Words, TEXT, lambda v: F.cross_entropy(v.transpose(1, 2), NEXT), 35),
    "tokens, time first": Case(lambda: Words(True), TEXT, lambda v: F.cross_entropy(v.permute(1, 2, 0), NEXT), 35),
    "a tuple": Case(lambda: Heads(lambda a, b, x: (a, b)), VECTORS, both, 5),
    "a tuple with names": Case(lambda: Heads(lambda a, b, x: Pair(a, b)), VECTORS, lambda p: both((p.one, p.two)), 5),
    "a dict": Case(
        lambda: Heads(lambda a, b, x: {"b": b, "x": x, "more": [a], "n": 1}),
        VECTORS,
        lambda v: both((v["more"][0], v["b"])),
        5,
    ),
    "tokens, and what an encoder made of them": Case(
        Encoded, TEXT, lambda v: F.cross_entropy(v["logits"].flatten(0, 1), NEXT.flatten()), 35 + 20
    ),
    "mean and variance": Case(VAE, VECTORS, evidence, 10, {"output": "returned"}),
    "one vector, as returned": Case(
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3), nn.LogSoftmax(1)),
        VECTORS,
        lambda v: F.nll_loss(v, LABELS),
        3,
        {"output": "returned"},
    ),
}


def taught(net: ControlledNetwork, rule: Any, case: Case) -> Any:
    net.module.zero_grad()
    torch.manual_seed(1)  # of what is drawn on the way
    with net.taught_by(rule) as lesson:
        loss = case.loss(net(case.x))
    loss.backward()
    return lesson


@pytest.mark.parametrize("name", CASES)
def test_the_loss_and_backprops_update_are_those_of_autograd(name):
    case = CASES[name]
    torch.manual_seed(0)
    module = case.make().double()
    plain, net = copy.deepcopy(module), ControlledNetwork(module, **case.options)
    for _ in range(2):  # the second pass knows the first one's structure
        lesson = taught(net, Backprop(), case)
        assert lesson.forward.output.shape == (4, case.n_outputs)
        plain.zero_grad()
        torch.manual_seed(1)
        case.loss(plain(case.x)).backward()
        for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
            assert (ours.grad - theirs.grad).norm() <= 1e-10 * theirs.grad.norm()


@pytest.mark.parametrize("rule", [DFC(), LayeredDFC()], ids=["direct", "layered"])
@pytest.mark.parametrize("name", CASES)
def test_all_of_the_output_is_controlled(name, rule):
    case = CASES[name]
    torch.manual_seed(0)
    module = case.make().double()
    net = ControlledNetwork(module, seed=0, **case.options)
    lesson = taught(net, rule, case)
    assert lesson.settled.converged.all()
    assert all(p.grad.any() for p in module.parameters())


def test_what_is_returned_keeps_its_kind_and_what_is_no_output_is_handed_on_as_it_is():
    net = ControlledNetwork(CASES["a dict"].make().double())
    with net.taught_by(DFC()):
        found = net(VECTORS)
    assert list(found) == ["b", "x", "more", "n"] and found["x"] is VECTORS and found["n"] == 1
    module = CASES["a tuple with names"].make().double()
    with ControlledNetwork(module).taught_by(DFC()):
        assert isinstance(module(VECTORS), Pair)


def test_layers_called_one_by_one_have_their_output_where_a_loss_is_taken():
    module = UNet().double()

    def run() -> Tensor:
        return module.head(torch.cat([torch.relu(module.up(torch.relu(module.down(MAPS)))), MAPS], 1))

    net = ControlledNetwork(module)
    with net.taught_by(Backprop()):
        loss = F.cross_entropy(run(), KINDS)
    loss.backward()
    found = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    F.cross_entropy(run(), KINDS).backward()
    assert all(torch.allclose(a, p.grad, 1e-10, 1e-14) for a, p in zip(found, module.parameters(), strict=True))


def test_a_loss_beside_a_matrix_names_the_remedy():
    net = ControlledNetwork(VAE().double())
    with net.taught_by(DFC()):
        loss = evidence(net(VECTORS))
    with pytest.raises(ControlError, match="beside the network's output.*output='returned'"):
        loss.backward()
    with pytest.raises(ValueError, match="output='all'.*choose one of"):
        ControlledNetwork(VAE(), output="all")


def test_a_network_of_torchvision_that_returns_maps_in_a_dict_is_taken():
    torch.manual_seed(0)
    module = torchvision.models.segmentation.lraspp_mobilenet_v3_large(num_classes=3, weights_backbone=None)
    module = module.eval().double()
    x, y = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.randint(3, (2, 32, 32))
    net = ControlledNetwork(module)
    with net.taught_by(Backprop()):
        loss = F.cross_entropy(net(x)["out"], y)
    loss.backward()
    found = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    F.cross_entropy(module(x)["out"], y).backward()
    for ours, p in zip(found, module.parameters(), strict=True):
        assert (ours - p.grad).norm() <= 1e-9 * p.grad.norm() + 1e-14
