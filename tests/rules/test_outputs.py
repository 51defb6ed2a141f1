"""Points that are the output, by themselves or with others: each is taught by its own error under every rule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases.graphs import ConvHead, Plain, Residual
from torch import Tensor, nn

from dfc_lightning import DFA, DFC, Backprop, ControlledNetwork, LearningRule, MinimumNorm
from dfc_lightning.settling import Linearized

JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda b, side: b + side,
    "difference": lambda b, side: b - 0.5 * side,
    "weighted sum": lambda b, side: 0.3 * b + 2 * side,
    "mean": lambda b, side: torch.stack([b, side], dim=1).mean(1),
    "side by side": lambda b, side: torch.cat([b, side], dim=1),
}


class Heads(nn.Module):
    """Two heads on one hidden layer."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.side, self.join = nn.Linear(6, 16), nn.Linear(16, 3), nn.Linear(16, 3), join

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.join(self.b(h), self.side(h))


RULES: dict[str, tuple[LearningRule, str | None]] = {
    "backprop": (Backprop(), None),
    "DFA": (DFA(), None),
    "minimum norm": (MinimumNorm(), None),
    "DFC-SS": (DFC(), None),
    "DFC-SSA": (DFC(settling=Linearized()), None),
    "DFC, xavier_normal": (DFC(), "xavier_normal"),
    "DFC, orthogonal": (DFC(), "orthogonal"),
}


def taught(join: str, rule: str) -> tuple[ControlledNetwork, dict[str, Tensor], dict[str, Tensor]]:
    """What a rule teaches, and autograd."""
    torch.manual_seed(0)
    module = Heads(JOINS[join]).double()
    for head in (module.b, module.side):  # the hidden layer turns the control too: less than the heads hear of it
        head.weight.data *= 0.5
    x, y = torch.randn(32, 6, dtype=torch.float64), (torch.arange(32) % 6).clamp(max=2)  # most of one class, so that
    # the errors of the samples do not cancel in the biases
    way, init = RULES[rule]
    net = ControlledNetwork(module, feedback_init=init, seed=0)
    with net.taught_by(way):
        loss = F.cross_entropy(net(x), y)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    F.cross_entropy(module(x), y).backward()
    return net, ours, {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("rule", RULES)
def test_every_head_descends_the_loss(join, rule):
    _, ours, true = taught(join, rule)
    for head in ("b", "side"):
        for kind in ("weight", "bias"):
            mine, theirs = ours[f"{head}.{kind}"], true[f"{head}.{kind}"]
            if rule in ("backprop", "DFA"):
                assert (mine - theirs).norm() <= 1e-10 * theirs.norm()
            else:
                assert torch.cosine_similarity(mine.flatten(), theirs.flatten(), dim=0) > 0.9, (head, kind)


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("init", ["xavier_normal", "orthogonal", "normal"])
def test_random_feedback_weights_leave_the_heads_what_they_need_to_hear_of_their_own_error(join, init):
    torch.manual_seed(0)
    module = Heads(JOINS[join]).double()
    net = ControlledNetwork(module, feedback_init=init, seed=0)
    net.observe(torch.randn(8, 6, dtype=torch.float64))
    b, side = torch.zeros(2, 3, dtype=torch.float64)
    jacobians = torch.autograd.functional.jacobian(module.join, (b.unsqueeze(0), side.unsqueeze(0)))
    for q, j in zip(net.feedback[1:], jacobians):
        assert torch.allclose(q.detach(), j[0, :, 0].T, rtol=0, atol=1e-12)


def chain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


class Skip(nn.Module):
    """The last layer adds to what the one before it has sent: both lie next to the output, one of them not only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.b(torch.tanh(self.a(x))))
        return h + self.c(h)


WHERE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[str, ...]]] = {
    "chain": (chain, (6,), ("4",)),
    "one layer": (lambda: nn.Linear(6, 3), (6,), ("",)),
    "plain convolutions": (Plain, (2, 6, 6), ("fc2",)),
    "residual": (Residual, (2, 6, 6), ("fc",)),
    "residual to the end": (Skip, (6,), ("c",)),
    "two heads": (lambda: Heads(JOINS["difference"]), (6,), ("b", "side")),
    "heads side by side": (lambda: Heads(JOINS["side by side"]), (6,), ("b", "side")),
    "conv head": (ConvHead, (2, 5, 5), ("c2",)),
}


@pytest.mark.parametrize("name", WHERE)
@pytest.mark.parametrize("general", [False, True])
def test_points_are_the_output_where_no_other_lies_between(name, general):
    make, shape, expected = WHERE[name]
    net = ControlledNetwork(make(), general=general)
    forward = net.observe(torch.randn(4, *shape))
    assert tuple(net.points[i].name for i in forward.outputs_at) == expected
    assert tuple(net.outputs_at) == tuple(forward.outputs_at)
    errors = forward.output_errors(torch.randn(4, forward.outputs))
    assert [i for i, e in enumerate(errors) if e is not None] == forward.outputs_at
