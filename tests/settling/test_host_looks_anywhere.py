"""The host is not waited for in steps of any network, nor by any rule or feedback learning: counted without data.

Unlike fake tensors of a GPU, those of the meta device can be differentiated where there is no driver.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from cases.graphs import NETWORKS
from cases.looks import Looks
from torch import nn

from dfc_lightning import (
    DFA,
    DFC,
    Backprop,
    ControlledNetwork,
    DifferenceReconstruction,
    DifferenceTargetPropagation,
    DualPropagation,
    Expected,
    FeedbackAlignment,
    KolenPollack,
    LayeredDFC,
    LearningRule,
    Sampled,
    SignSymmetry,
    WeightMirror,
)
from dfc_lightning.feedback_learning.method import FeedbackMethod
from dfc_lightning.settling import Euler, Linearized, SteadyState

NETS = pytest.mark.parametrize("net", ["chain", "plain", "residual", "mixed", "pre-norm"])
CHAIN = "chain"


def moved(module: nn.Module) -> None:
    """Give the module parameters and buffers without data."""
    for part in module.modules():
        for held, wrap in ((part._parameters, nn.Parameter), (part._buffers, lambda t: t)):
            for name, t in held.items():
                if t is not None:
                    held[name] = wrap(torch.empty(t.shape, dtype=t.dtype, device="meta"))


def looks(monkeypatch: pytest.MonkeyPatch, net: str, rule: LearningRule, method: FeedbackMethod | None = None) -> int:
    """How often the host looks in a pass and an update off the CPU, of a network that has been seen before.

    Or in a pass and the gradients of its feedback weights by ``method``.
    """
    torch.manual_seed(0)
    if net == CHAIN:
        module: nn.Module = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
        shape: tuple[int, ...] = (6,)
    else:
        make, shape = NETWORKS[net]
        module = make()
    controlled = ControlledNetwork(module, seed=0)
    with controlled.taught_by(rule):
        loss = F.cross_entropy(controlled(torch.randn(8, *shape)), torch.arange(8) % 3)
    loss.backward()
    controlled.observe(torch.randn(8, *shape))  # feedback weights are made, which looks
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(torch, "autocast", lambda *args, **settings: nullcontext())  # unknown there
        moved(module)
        controlled.weights.values = [
            nn.Parameter(torch.empty(q.shape, dtype=q.dtype, device="meta")) for q in controlled.feedback
        ]
        x = torch.empty(8, *shape, device="meta")
        with Looks() as counter:
            forward = controlled.observe(x)
            if rule.feedback is not None:
                forward = controlled.bound(forward, rule.feedback)
            if method is None:
                rule.teach(forward, torch.empty_like(forward.output))
            else:
                method.draw(forward, lambda shape: torch.empty(tuple(shape), device="meta"))
    return counter.count


RULES = [
    Backprop(),
    DFA(),
    FeedbackAlignment(),
    KolenPollack(),
    SignSymmetry(),
    WeightMirror(),
    DifferenceTargetPropagation(),
    DualPropagation(),
]


@NETS
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_a_rule_without_dynamics_never_looks(rule, net, monkeypatch):
    assert looks(monkeypatch, net, rule) == 0


@NETS
def test_learning_by_reconstruction_never_looks(net, monkeypatch):
    assert looks(monkeypatch, net, DifferenceTargetPropagation(), DifferenceReconstruction()) == 0


@NETS
@pytest.mark.parametrize("kind", [DFC, LayeredDFC])
def test_a_steady_state_looks_at_every_fourth_iteration_and_at_its_end(kind, net, monkeypatch):
    # at the end: which point is the best, whether all samples have settled, whether all may teach
    assert looks(monkeypatch, net, kind(SteadyState(max_iterations=24))) == 24 // 4 + 3


@NETS
@pytest.mark.parametrize("settling", [Linearized(), Euler(steps=17)], ids=["linearised", "Euler"])
def test_what_does_not_iterate_looks_at_its_end_alone(settling, net, monkeypatch):
    assert looks(monkeypatch, net, DFC(settling)) == 1


@NETS
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", [Expected, Sampled])
def test_feedback_learning_looks_no_more_often_for_more_steps(kind, gated, net, monkeypatch):
    few, many = (looks(monkeypatch, net, DFC(), kind(steps=steps, gated=gated)) for steps in (10, 40))
    assert few == many <= 10
