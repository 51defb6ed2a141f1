"""Calls of the network without gradients, beside the one that is taught, are no second use of its layers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from cases.chains import close
from torch import Tensor, nn

from dfc_lightning import Backprop, ControlledNetwork

OFF = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def nets() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    conv = nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    return {"dense": dense, "recorded": conv}


@pytest.mark.parametrize("when", ["before", "after", "both"])
@pytest.mark.parametrize("off", OFF)
@pytest.mark.parametrize("name", ["dense", "recorded"])
def test_they_change_nothing_in_the_first_step_and_in_later_ones(name, off, when):
    net = nets()[name].double()
    plain, controlled = copy.deepcopy(net), ControlledNetwork(net)
    for step in range(3):
        x, y = torch.randn(7, 6, dtype=torch.float64), torch.arange(7) % 3
        beside = step != 1  # also where it comes only now and then
        with controlled.taught_by(Backprop()):
            if beside and when != "after":
                with OFF[off]():
                    sure = net(x[:4] + 1).softmax(1)
            loss = F.cross_entropy(net(x), y)
            if beside and when != "before":
                with OFF[off]():
                    sure = net(x + 1)
        loss.backward()
        assert not beside or not sure.requires_grad
        F.cross_entropy(plain(x), y).backward()
        for ours, theirs in zip(net.parameters(), plain.parameters()):
            assert close(ours.grad, theirs.grad, 1e-10)
            ours.grad = theirs.grad = None


def test_what_is_computed_without_gradients_within_the_pass_is_a_constant_as_for_autograd():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x))
            with torch.no_grad():
                size = h.norm(dim=1, keepdim=True)
            return self.b(h / size)

    torch.manual_seed(0)
    net = Scaled().double()
    plain, controlled = copy.deepcopy(net), ControlledNetwork(net)
    x, y = torch.randn(7, 6, dtype=torch.float64), torch.arange(7) % 3
    for observed in (False, True):  # a feedback pass takes it likewise
        if observed:
            assert close(controlled.observe(x).output, plain(x).detach(), 1e-12)
        with controlled.taught_by(Backprop()):
            loss = F.cross_entropy(net(x), y)
        loss.backward()
    F.cross_entropy(plain(x), y).backward()
    assert all(close(p.grad, 2 * q.grad, 1e-10) for p, q in zip(net.parameters(), plain.parameters()))
