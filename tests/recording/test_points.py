"""Which networks are followed, in which modes and shapes, and which arguments are possible."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfc_lightning import (
    DFC,
    ControlError,
    ControlledNetwork,
    DFCStrategy,
    FeedbackLearning,
    MinimumNorm,
    NudgedTarget,
    PIController,
    Sampled,
)
from dfc_lightning.settling import Euler, Linearized, SteadyState


class Via(nn.Module):
    """``forward`` is any function of the module and its input; the layers are 6-5-4-3."""

    def __init__(self, forward: Callable[..., Tensor], *others: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)
        self.others = nn.ModuleList(others)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def sequential(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), *between, nn.Linear(5, 3))


def images(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 2, 3)), *layers)


torch.manual_seed(0)
GENERAL = {
    "conv": images(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)),
    "batch norm": sequential(nn.BatchNorm1d(5), nn.Tanh()),
    "batch norm without parameters": sequential(nn.BatchNorm1d(5, affine=False, track_running_stats=False)),
    "layer norm": sequential(nn.LayerNorm(5)),
    "layer norm without parameters": sequential(nn.LayerNorm(5, elementwise_affine=False)),
    "normalised input": nn.Sequential(nn.LayerNorm(6), *sequential(nn.Tanh())),
    "dropout": sequential(nn.Dropout(0.5)),
    "softmax between": Via(lambda m, x: m.c(torch.tanh(m.b(m.a(x).softmax(1))))),
    "residual sum": Via(lambda m, x: m.c(m.b((h := m.a(x)).tanh()) + h[:, :4])),
    "sum with the input": Via(lambda m, x: m.c(m.b(m.a(x) + x[:, :5]))),
    "branches": Via(lambda m, x: m.a(x)[:, :3] + m.c(m.b(x[:, :5]))),
    "gated by the input": Via(lambda m, x: m.c(m.b(m.a(x) * x[:, :5]))),
    "noise added": Via(lambda m, x: m.c(m.b((h := m.a(x)) + 0.1 * torch.randn_like(h)))),
    "permuted units": Via(lambda m, x: m.c(m.b(m.a(x).flip(1)))),
    "sliced": Via(lambda m, x: m.c(m.b(m.a(x)[:, [0, 1, 2, 3, 3]]))),
    "max-pooling": Via(lambda m, x: m.c(m.b(F.max_pool1d(m.a(x), 3, 1, 1)))),
    "frozen layer between": Via(lambda m, x: m.c(m.b(m.a(x)))),
    "positions": nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)),
}
GENERAL["frozen layer between"].b.requires_grad_(False)


@pytest.mark.parametrize("name", GENERAL)
def test_what_is_no_chain_settles_and_teaches_every_parameter(name):
    module = GENERAL[name].double()
    torch.manual_seed(1)
    x, y = torch.randn(8, 6).double(), torch.randint(3, (8,))
    net = ControlledNetwork(module, feedback_init="xavier_normal")
    with net.taught_by(DFC()) as lesson:
        loss = F.cross_entropy(net(x), y)
    loss.backward()
    assert not net.may_be_dense and lesson.settled.converged.all()
    for parameter in module.parameters():
        taught = parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any()
        assert taught == parameter.requires_grad


def test_a_network_called_twice_in_one_step_is_refused():
    net = ControlledNetwork(sequential(nn.Tanh()))
    with pytest.raises(ControlError, match="called twice"), net.taught_by(DFC()):
        net(torch.randn(4, 6))
        net(torch.randn(4, 6))


def test_another_order_than_in_the_first_step_is_refused():
    module = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    net = ControlledNetwork(module)
    net.observe(torch.randn(4, 5))
    with pytest.raises(ControlError, match="another order"), net.taught_by(DFC()):
        module[0](torch.tanh(module[2](torch.randn(4, 5))))


def test_units_are_dropped_while_training_only_whichever_mode_is_seen_first():
    module = sequential(nn.Dropout(0.5)).eval()
    net, x = ControlledNetwork(module), torch.randn(64, 6)
    assert torch.equal(net.observe(x).output, module(x))
    module.train()
    torch.manual_seed(0)
    dropped = net.observe(x).output
    torch.manual_seed(0)
    assert torch.allclose(dropped, module(x), atol=1e-6) and not torch.allclose(dropped, module.eval()(x))


def test_a_chain_in_evaluation_may_drop_units_in_training_and_is_followed_in_each_mode():
    torch.manual_seed(0)
    module = Via(lambda m, x: m.c(torch.tanh(m.b(F.dropout(m.a(x), 0.5, m.training))))).double()
    x, y = torch.randn(64, 6).double(), torch.randint(3, (64,))
    net, recorded = (ControlledNetwork(module, general=general, seed=0) for general in (False, True))

    def step(network: ControlledNetwork) -> list[Tensor]:
        torch.manual_seed(1)
        module.zero_grad()
        with network.taught_by(DFC()) as lesson:
            loss = F.cross_entropy(network(x), y)
        loss.backward()
        assert lesson.forward.dense == (not module.training and not network.general)
        return [p.grad.clone() for p in module.parameters()]

    recorded.observe(x)
    for training in (False, True, False):
        module.train(training)
        net.observe(x)
        recorded.load_state_dict(net.state_dict())
        ours, theirs = step(net), step(recorded)
        assert all((a - b).norm() <= 1e-9 * b.norm() for a, b in zip(ours, theirs))


def test_an_output_that_is_no_batch_of_vectors_is_refused():
    with pytest.raises(ControlError, match=r"no output of the shape \(B, n_L\).*[Ff]latten"):
        ControlledNetwork(sequential(nn.Tanh())).observe(torch.randn(6))


def test_a_chain_keeps_to_inputs_of_one_shape():
    net = ControlledNetwork(sequential(nn.Tanh()))
    net.observe(torch.randn(4, 6))
    with pytest.raises(ControlError, match=r"'0' returns the shape \(2, 7, 5\).*one shape"):
        net.observe(torch.randn(2, 7, 6))


def test_network_names_the_submodule_to_control():
    module = nn.ModuleDict({"conv": nn.Conv1d(1, 1, 1), "head": sequential(nn.Tanh())})
    assert [p.name for p in ControlledNetwork(module, network="head").points] == ["head.0", "head.2"]
    assert [p.name for p in ControlledNetwork(module, network="head.0").points] == ["head.0"]
    with pytest.raises(ControlError, match=r"network='tail' is no submodule.*'conv', 'head'"):
        ControlledNetwork(module, network="tail")


ARGUMENTS = {
    "k_p": (lambda: PIController(k_p=-1.0), r"k_p=-1\.0.*zero or more"),
    "alpha": (lambda: PIController(alpha=-0.1), r"alpha=-0\.1.*zero or more"),
    "alpha nan": (lambda: PIController(alpha=float("nan")), "alpha=nan"),
    "leak": (lambda: PIController(leak="none"), r"leak='none'.*\"integral\""),
    "dt too large": (lambda: Euler(dt=0.3, tau_ratio=0.2), r"tau_ratio=0\.2.*dt=0\.3.*lower dt"),
    "dt zero": (lambda: Euler(dt=0.0), r"dt=0\.0.*above zero"),
    "feedback dt": (lambda: Sampled(dt=0.1), r"tau_ratio=.*lower dt"),
    "steps": (lambda: Euler(steps=0), "steps=0.*at least one"),
    "target_stepsize": (lambda: DFC(target_stepsize=0.0), r"target_stepsize=0\.0.*above zero"),
    "target": (lambda: NudgedTarget(-1.0), r"target_stepsize=-1\.0"),
    "minimum norm": (lambda: MinimumNorm(target_stepsize=0.0), r"target_stepsize=0\.0"),
    "integrate": (lambda: DFC(SteadyState(), integrate=True), r"integrate=True.*SteadyState.*Euler"),
    "integrate linearized": (lambda: DFC(Linearized(), integrate=True), r"integrate=True.*Linearized.*Euler"),
    "plasticity": (lambda: DFC(plasticity="hebb"), "plasticity='hebb'.*rate_difference"),
    "unconverged": (lambda: DFC(unconverged="hide"), "unconverged='hide'.*keep"),
    "sigma": (lambda: Sampled(sigma=0.0), r"sigma=0\.0.*above zero"),
    "passes": (lambda: FeedbackLearning(initial_passes=-1), "initial_passes=-1.*zero or more"),
    "lr": (lambda: FeedbackLearning(lr=0.0), r"lr=0\.0.*above zero"),
    "feedback_init": (lambda: ControlledNetwork(nn.Linear(2, 2), feedback_init="zeros"), "feedback_init='zeros'"),
    "strategy's init": (lambda: DFCStrategy(feedback_init="zeros"), "feedback_init='zeros'"),
    "loss_reduction": (lambda: DFCStrategy(loss_reduction="none"), "loss_reduction='none'.*mean"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_impossible_argument_is_named_with_value_and_remedy(name):
    make, message = ARGUMENTS[name]
    with pytest.raises(ValueError, match=message):
        make()
