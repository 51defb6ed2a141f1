"""The weight mirror, sampled and in closed form, against what noise makes of a layer on the average."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases.chains import close
from cases.through import NETS, made
from torch import Tensor, nn

from dfc_lightning import (
    ControlledNetwork,
    ExpectedMirror,
    FeedbackAlignment,
    FeedbackLearner,
    FeedbackLearning,
    Layerwise,
    SampledMirror,
)
from dfc_lightning.metrics import condition_two

SGD = FeedbackLearning(ExpectedMirror(), lr=0.1, optimizer="sgd", weight_decay=0.0, clip_norm=None)


def bound(module: nn.Module, x: Tensor, **settings: object) -> ControlledNetwork:
    net = ControlledNetwork(module, seed=0, **settings)
    net.observing(lambda: module(x), Layerwise())
    return net


def normal(generator: torch.Generator):
    return lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 4),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, 3, stride=2, groups=2, padding=2),
        nn.Conv2d(4, 4, (2, 3), dilation=2, groups=4),
        nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2),
    ],
    ids=["dense", "padded", "grouped", "depthwise", "transposed"],
)
def test_noise_in_a_layer_tells_its_weight(layer):
    """The mean over many draws is W, the padding's missing uses counted out; a single draw is far from it."""
    torch.manual_seed(0)
    if isinstance(layer, nn.Linear):
        module, x = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 2)), torch.randn(40, 3)
    else:
        module = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Tanh(), layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(2))
        x = torch.randn(40, 1, 5, 5)
    module(x)
    module, x = module.double(), x.double()
    net = bound(module, x)
    forward = net.bound(net.observe(x))
    w, b = layer.weight.detach(), net.feedback[1].detach()
    generator, draws = torch.Generator().manual_seed(1), []
    for _ in range(400):
        draws.append(b - SampledMirror().gradient(forward, normal(generator))[1])
    found = torch.stack(draws)
    spread = found.std(0) / 400**0.5
    assert ((found.mean(0) - w).abs() < 5 * spread).all()
    assert (found[0] - w).norm() > 3 * (found.mean(0) - w).norm()
    assert close(ExpectedMirror().gradient(forward, normal(generator))[1], b - w, 1e-12)


@pytest.mark.parametrize("name", NETS)
def test_the_first_layer_learns_none_and_the_rest_come_to_the_weights(name):
    module, x, y = made(name)
    net = bound(module, x)
    learner, before = FeedbackLearner(net, SGD), [b.detach().clone() for b in net.feedback]
    with torch.no_grad():
        for _ in range(30):
            learner.step(net.observe(x))
    for was, b, point, carries in zip(before, net.feedback, net.points, net.weights.carrying):
        if carries:  # a running mean of rate 0.1
            assert close(b - point.weight, (was - point.weight) * 0.9**30, 1e-9)
        else:
            assert torch.equal(b, was)


@pytest.mark.parametrize("name", NETS)
def test_learned_feedback_meets_condition_two_in_every_sample(name):
    """Theorem 6's end for layered feedback: K_i is J_iᵀ of each sample, by closed form to rounding, by noise nearly."""
    module, x, y = made(name)
    for method, steps, least in ((ExpectedMirror(), 400, 1 - 1e-9), (SampledMirror(), 2000, 0.98)):
        net = bound(module, x)
        learner = FeedbackLearner(net, replace(SGD, method=method, lr=0.05 if steps == 400 else 0.01))
        forward = net.bound(net.observe(x))
        start = condition_two(torch.cat(forward.feedback_rows(), 2).mT, torch.cat(forward.jacobians(), 2))
        with torch.no_grad():
            for _ in range(steps):
                learner.step(net.observe(x))
        forward = net.bound(net.observe(x))
        j, k = torch.cat(forward.jacobians(), 2), torch.cat(forward.feedback_rows(), 2).mT
        each = torch.stack([condition_two(k[b : b + 1], j[b : b + 1]) for b in range(len(x))])
        assert each.min() > least > start
        if steps == 400:
            assert close(k, j.mT, 1e-6)


def test_it_is_no_backprop_before_it_has_learned():
    module, x, y = made("mlp")
    net = ControlledNetwork(module, seed=0)
    with net.taught_by(FeedbackAlignment()):
        loss = F.cross_entropy(net(x), y)
    loss.backward()
    found = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    F.cross_entropy(module(x), y).backward()
    assert not close(found[0], module[0].weight.grad, 0.1)
