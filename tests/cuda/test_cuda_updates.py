"""On a GPU every rule, settling method and feedback learning gives what it gives on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.chains import close
from cases.graphs import NETWORKS
from torch import Tensor, nn

from dfc_lightning import (
    DFA,
    DFC,
    Backprop,
    ControlledNetwork,
    Expected,
    FeedbackAlignment,
    FeedbackLearner,
    FeedbackLearning,
    ForwardGradient,
    KolenPollack,
    LayeredDFC,
    LearningRule,
    MinimumNorm,
    PIController,
    Sampled,
    SignSymmetry,
    WeightMirror,
)
from dfc_lightning.models import VGG5, LeNet, ResNet
from dfc_lightning.rules import (
    DifferenceTargetPropagation,
    DirectRandomTargetProjection,
    DualPropagation,
    LeastControl,
    PredictiveCoding,
    StrongDFC,
    TwoPhaseStrongDFC,
)
from dfc_lightning.settling import Descent, Equilibrium, Euler, Linearized, SteadyState, Trajectory

pytestmark = pytest.mark.cuda

CHAIN = "chain"
RULES: dict[str, LearningRule] = {
    "backprop": Backprop(),
    "steady state": DFC(),
    "steady state, α": DFC(controller=PIController(0.1, 1.0), target_stepsize=0.05),
    "linearised": DFC(Linearized()),
    "Euler": DFC(Euler(steps=40), PIController(0.1, 1.0)),
    "Euler, averaged": DFC(Euler(steps=40), PIController(0.1, 1.0), integrate=True),
    "Euler, delayed": DFC(Euler(steps=40, instant_transmission=False, apical_tau=0.3), PIController(0.1)),
    "layered": LayeredDFC(SteadyState()),
    "layered, Euler": LayeredDFC(Euler(steps=20)),
    "minimum norm": MinimumNorm(),
    "minimum norm, damped": MinimumNorm(damping=1.0),
    "DFA": DFA(),
    "FA": FeedbackAlignment(),
    "Kolen-Pollack": KolenPollack(),
    "weight mirror": WeightMirror(),
    "signs": SignSymmetry(),
    "signs, new draws": SignSymmetry("batch_random"),
    "difference targets": DifferenceTargetPropagation(),
    "least control": LeastControl(equilibrium=Equilibrium(1e-11, 200), link="softmax"),
    "predictive coding": PredictiveCoding(Equilibrium(1e-11, 200), link="softmax"),
    "predictive coding, steps": PredictiveCoding(Descent(5, 0.2), centred=True, link="softmax"),
    "dual propagation": DualPropagation(),
    "DRTP": DirectRandomTargetProjection("softmax"),
    "forward gradient": ForwardGradient(),
    "Strong-DFC": StrongDFC(link="softmax"),
    "Strong-DFC, two phases": TwoPhaseStrongDFC(link="softmax"),
}
ON_CHAINS = {"trajectory": DFC(Trajectory(steps=60), PIController(0.1, 1.0), integrate=True)}
ON_GRAPHS = {name: rule for name, rule in RULES.items() if "Strong" not in name}
PRECISE = 1e-9
LEARNED = {
    "expected": FeedbackLearning(method=Expected(steps=12)),
    "expected, gated": FeedbackLearning(method=Expected(steps=12, gated=True)),
    "sampled": FeedbackLearning(method=Sampled(steps=12)),
    "an eighth": FeedbackLearning(method=Expected(steps=12), every_nth_sample=2),
}


def network(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """In float64 on the CPU, with a batch and labels."""
    torch.manual_seed(0)
    if name == CHAIN:
        module: nn.Module = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
        shape: tuple[int, ...] = (6,)
    else:
        make, shape = NETWORKS[name]
        module = make()
    return module.double(), torch.randn(8, *shape, dtype=torch.float64), torch.randint(3, (8,))


def update(module: nn.Module, x: Tensor, y: Tensor, rule: LearningRule) -> Tensor:
    """Two updates, one after the other, in one vector on the CPU."""
    net, found = ControlledNetwork(module, seed=0), []
    for _ in range(2):
        module.zero_grad()
        with net.taught_by(rule):
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        found += [p.grad.flatten().cpu() for p in module.parameters() if p.grad is not None]
    return torch.cat(found)


def both(name: str, rule: LearningRule, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The updates on the CPU and on the device."""
    module, x, y = network(name)
    module, x, twin = module.to(dtype), x.to(dtype), copy.deepcopy(module).to(device, dtype)
    return update(module, x, y, rule), update(twin, x.to(device), y.to(device), rule)


@pytest.mark.parametrize("name", RULES | ON_CHAINS)
def test_a_chain_is_taught_what_it_is_on_the_cpu(name: str, device: torch.device, host_draws: None) -> None:
    here, there = both(CHAIN, (RULES | ON_CHAINS)[name], device, torch.float64)
    assert here.norm() > 0 and close(there, here, PRECISE)


@pytest.mark.parametrize("net", ["plain", "residual", "mixed", "pre-norm"])
@pytest.mark.parametrize("name", ON_GRAPHS)
def test_other_networks_likewise(name: str, net: str, device: torch.device, host_draws: None) -> None:
    here, there = both(net, ON_GRAPHS[name], device, torch.float64)
    assert here.norm() > 0 and close(there, here, PRECISE)


@pytest.mark.parametrize("net", [CHAIN, "plain", "residual"])
@pytest.mark.parametrize("name", ["backprop", "steady state", "linearised", "layered", "minimum norm", "Kolen-Pollack"])
def test_float32_keeps_its_digits(
    name: str, net: str, device: torch.device, host_draws: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # of the forward pass, which is the user's
    here, there = both(net, RULES[name], device, torch.float32)
    assert close(there, here, 2e-3)


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("net", [CHAIN, "plain", "residual"])
def test_feedback_weights_learn_what_they_do_on_the_cpu(
    net: str, name: str, device: torch.device, host_draws: None
) -> None:
    module, x, _ = network(net)
    learned = []
    for where in (torch.device("cpu"), device):
        controlled = ControlledNetwork(copy.deepcopy(module).to(where), seed=0)
        learner = FeedbackLearner(controlled, LEARNED[name], seed=1)
        for k in range(3):
            learner.step(controlled.observe(x.to(where)), initial=k == 0)
        learned.append(torch.cat([q.detach().flatten().cpu() for q in controlled.feedback]))
    assert close(learned[1], learned[0], 1e-8)


def test_so_do_those_of_layers(device: torch.device, host_draws: None) -> None:
    module, x, y = network("plain")
    learned = []
    for where in (torch.device("cpu"), device):
        controlled, rule = ControlledNetwork(copy.deepcopy(module).to(where), seed=0), WeightMirror()
        with controlled.taught_by(rule):
            F.cross_entropy(controlled(x.to(where)), y.to(where)).backward()
        learner = FeedbackLearner(controlled, rule.learning, seed=1)
        for _ in range(3):
            learner.step(controlled.observe(x.to(where)), initial=True)
        learned.append(torch.cat([q.detach().flatten().cpu() for q in controlled.feedback]))
    assert close(learned[1], learned[0], 1e-8)


@pytest.mark.parametrize("init", ["weight_product", "jacobian", "xavier_normal"])
def test_feedback_weights_start_alike(init: Any, device: torch.device) -> None:
    module, x, _ = network("plain")
    made = []
    for where in (torch.device("cpu"), device):
        controlled = ControlledNetwork(copy.deepcopy(module).to(where), seed=0, feedback_init=init)
        controlled.bound(controlled.observe(x.to(where)))
        made.append(torch.cat([q.detach().flatten().cpu() for q in controlled.feedback]))
    assert close(made[1], made[0], 1e-9)


@pytest.mark.parametrize("make", [LeNet, VGG5, lambda: ResNet(shortcuts="padding")], ids=["LeNet", "VGG-5", "ResNet"])
@pytest.mark.parametrize("tf32", [False, True], ids=["float32", "TF32"])
def test_a_steady_state_is_reached_whatever_the_convolutions_are_rounded_to(
    make: Any, tf32: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    torch.manual_seed(0)
    module = make().to(device)
    x = torch.randn(32, *((1, 28, 28) if make is LeNet else (3, 32, 32)), device=device)
    net = ControlledNetwork(module, seed=0)
    with net.taught_by(DFC(SteadyState(rtol=1e-4))) as lesson:
        loss = F.cross_entropy(net(x), torch.arange(32, device=device) % 10)
    loss.backward()
    assert lesson.settled is not None
    assert lesson.settled.converged.float().mean() > 0.9
    assert torch.backends.cudnn.allow_tf32 is tf32
