"""A normalisation that alone hears a layer belongs to its point, whether it has parameters or not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfc_lightning import DFA, DFC, Backprop, ControlledNetwork, LearningRule
from dfc_lightning.settling import Linearized, SteadyState


class Functional(nn.Module):
    """Normalises by a function."""

    def __init__(self, norm: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(h)


MAPS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "batch norm": (lambda: nn.BatchNorm2d(4, affine=False), lambda: nn.BatchNorm2d(4)),
    "frozen batch norm": (lambda: nn.BatchNorm2d(4).requires_grad_(False), lambda: nn.BatchNorm2d(4)),
    "group norm": (lambda: nn.GroupNorm(2, 4, affine=False), lambda: nn.GroupNorm(2, 4)),
    "functional batch norm": (
        lambda: Functional(lambda h: F.batch_norm(h, None, None, training=True)),
        lambda: nn.BatchNorm2d(4, track_running_stats=False),
    ),
    "instance norm": (lambda: nn.InstanceNorm2d(4), lambda: nn.GroupNorm(4, 4)),
}
VECTORS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "batch norm of units": (lambda: nn.BatchNorm1d(4, affine=False), lambda: nn.BatchNorm1d(4)),
    "layer norm": (lambda: nn.LayerNorm(4, elementwise_affine=False), lambda: nn.LayerNorm(4)),
    "functional layer norm": (lambda: Functional(lambda h: F.layer_norm(h, (4,))), lambda: nn.LayerNorm(4)),
    "rms norm": (lambda: nn.RMSNorm(4, elementwise_affine=False), lambda: nn.RMSNorm(4)),
}
RULES: dict[str, LearningRule] = {
    "DFC": DFC(SteadyState(rtol=1e-12), target_stepsize=0.3),
    "SSA": DFC(Linearized(), target_stepsize=0.3),
    "DFA": DFA(),
    "backprop": Backprop(),
}


def net(norm: Callable[[], nn.Module], maps: bool) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 2)] if maps else [nn.Linear(8, 4), nn.Linear(4, 4)]
    between = [nn.ReLU(), layers[1], norm(), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)]
    module = nn.Sequential(layers[0], norm(), *between).double()
    module(inputs(maps)[0])
    for m in module:
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats:
            m.reset_running_stats()
    torch.manual_seed(1)
    for layer in (*layers, module[-1]):
        nn.init.normal_(layer.weight)
    return module


def inputs(maps: bool) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    return torch.randn(6, *((2, 5, 5) if maps else (8,)), generator=g, dtype=torch.float64), torch.arange(6) % 3


def updates(module: nn.Module, rule: LearningRule, maps: bool, training: bool) -> dict[str, Tensor]:
    module.train(training)
    network = ControlledNetwork(module, seed=0)
    x, y = inputs(maps)
    with network.taught_by(rule):
        loss = F.cross_entropy(network(x), y)
    loss.backward()
    layers = {n: m for n, m in module.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    return {f"{n}.{k}": p.grad.clone() for n, m in layers.items() for k, p in m.named_parameters()}


CASES = [(name, True) for name in MAPS] + [(name, False) for name in VECTORS]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("name", "maps"), CASES)
def test_layers_are_taught_as_with_a_norm_of_weight_one_and_bias_zero(name, maps, rule, training):
    untaught, taught = (MAPS if maps else VECTORS)[name]
    mine = updates(net(untaught, maps), RULES[rule], maps, training)
    theirs = updates(net(taught, maps), RULES[rule], maps, training)
    assert mine.keys() == theirs.keys()
    for key, grad in theirs.items():
        assert (mine[key] - grad).norm() <= 1e-9 * (1e-6 + grad.norm()), key


def test_a_frozen_norm_keeps_its_weight_and_bias():
    module = net(lambda: nn.BatchNorm2d(4), True)
    with torch.no_grad():
        for m in (module[1], module[4]):
            m.weight.copy_(torch.tensor([0.5, 2.0, -1.0, 3.0])), m.bias.copy_(torch.tensor([0.1, -0.2, 0.3, 1.0]))
    frozen = copy.deepcopy(module)
    for m in (frozen[1], frozen[4]):
        m.requires_grad_(False)
    mine, theirs = (updates(each, RULES["DFC"], True, True) for each in (frozen, module))
    assert all((mine[k] - theirs[k]).norm() <= 1e-9 * (1e-6 + theirs[k].norm()) for k in theirs)
    assert frozen[1].weight.grad is None


def test_a_norm_that_is_not_alone_in_hearing_the_layer_is_left_where_it_is():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(torch.tanh(h + F.layer_norm(h, (4,))))

    module, (x, _) = Both().double(), inputs(False)
    forward = ControlledNetwork(module).observe(x)
    assert torch.allclose(forward.v[0], module.a(x))
