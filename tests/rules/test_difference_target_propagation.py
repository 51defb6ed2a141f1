"""Difference target propagation: targets by their formula and in limits, and inverses learned from noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.chains import close, degrees
from cases.fits import Innocent, clusters, loader, quiet, strategy
from cases.through import NETS, made
from torch import Tensor, nn

from dfc_lightning import (
    Backprop,
    ControlledNetwork,
    DifferenceReconstruction,
    DifferenceTargetPropagation,
    FeedbackLearner,
    FeedbackLearning,
    ForwardPass,
    Layerwise,
)

nets = pytest.mark.parametrize("name", NETS)
generals = pytest.mark.parametrize("general", [False, True], ids=["", "general"])


def bound(name: str, general: bool = False, **kind: Any) -> tuple[ForwardPass, Tensor, ControlledNetwork]:
    """A pass with layerwise feedback and the gradient of cross entropy."""
    module, x, y = made(name)
    net = ControlledNetwork(module, seed=0, general=general)
    forward = net.observing(lambda: module(x), Layerwise(**kind))
    return forward, forward.output.softmax(1) - F.one_hot(y, 3), net


def updates(rule: Any, forward: ForwardPass, grad: Tensor) -> Tensor:
    return torch.cat([t.flatten() for point in rule.teach(forward, grad).gradients for t in point])


# Targets


@generals
@pytest.mark.parametrize("nudge", [0.05, 0.7])
def test_targets_are_those_of_the_formula(general: bool, nudge: float) -> None:
    """t ← v + G(t) − G(v), layer by layer, by G itself; each layer takes a step from its voltage to its target."""
    forward, grad, net = bound("mlp", general)
    (w1, w2, w3), phis = forward.feedback, (torch.tanh, F.softplus)
    v1, v2, v3 = forward.v
    x, y = made("mlp")[1:]

    def inverse(phi: Callable[[Tensor], Tensor], below: Tensor, b: Tensor, v: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda t: phi(below + (t - v) @ b)

    g3, g2 = inverse(phis[1], v2, w3, v3), inverse(phis[0], v1, w2, v2)
    t3 = v3 - nudge * grad
    t2 = v2 + g3(t3) - g3(v3)
    t1 = v1 + g2(t2) - g2(v2)
    expected = []
    for v, t, r in ((v1, t1, x), (v2, t2, phis[0](v1)), (v3, t3, phis[1](v2))):
        expected += [(v - t).T @ r / nudge / len(x), (v - t).mean(0) / nudge]
    found = DifferenceTargetPropagation(nudge).teach(forward, grad).gradients
    assert all(close(a, b, 1e-10) for a, b in zip([t for each in found for t in each], expected))
    assert w1.shape == net.module[0].weight.shape  # of which there is no need


class _Reached(torch.autograd.Function):
    """A nonlinearity that hands errors on by φ(v) − φ(v − β e)."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, phi: Callable[[Tensor], Tensor], nudge: float) -> Tensor:
        ctx.save_for_backward(v)
        ctx.of = phi, nudge
        return phi(v)

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> Any:
        (v,), (phi, nudge) = ctx.saved_tensors, ctx.of
        return (phi(v) - phi(v - nudge * error)) / nudge, None, None


@pytest.mark.parametrize("name", ["conv", "residual"])
def test_pooling_shortcuts_and_convolutions_are_gone_back_through(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With B = W, autograd with the difference in the place of every derivative."""
    nudge, (module, x, y) = 0.4, made(name)
    forward, grad, _ = bound(name, init="weights")
    found = DifferenceTargetPropagation(nudge).teach(forward, grad)
    for owner, phi in ((torch, "tanh"), (F, "relu"), (F, "silu")):
        plain = getattr(owner, phi)
        monkeypatch.setattr(owner, phi, lambda v, plain=plain: _Reached.apply(v, plain, nudge))
    (len(x) * F.cross_entropy(module(x), y)).backward()
    expected = {n: p.grad / len(x) for n, p in module.named_parameters()}
    assert sum(t.norm() for t in expected.values()) > 0
    mine = torch.cat([t.flatten() for each in found.gradients for t in each])
    assert close(mine.norm(), torch.stack([t.norm() for t in expected.values()]).norm(), 1e-9)
    for t in (t for each in found.gradients for t in each):
        assert any(t.shape == e.shape and close(t, e, 1e-9) for e in expected.values())


@nets
@generals
def test_a_small_nudge_through_the_weights_is_backprop(name: str, general: bool) -> None:
    forward, grad, _ = bound(name, general, init="weights")
    true = updates(Backprop(), forward, grad)
    apart = [float((updates(DifferenceTargetPropagation(b), forward, grad) - true).norm()) for b in (1e-3, 1e-4)]
    assert apart[0] < 1e-3 * true.norm()
    assert apart[0] / apart[1] == pytest.approx(10, rel=0.3)  # it departs by order β


def test_by_pseudo_inverses_targets_are_those_of_gauss_and_newton() -> None:
    """In square linear layers t_i − v_i = J_i⁻¹ (t_L − v_L): a layer at its target brings the output to its own."""
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))).double()
    x, nudge = torch.randn(6, 4, dtype=torch.float64), 0.3
    net = ControlledNetwork(module, seed=0)
    forward = net.observing(lambda: module(x), Layerwise())
    inverses = [torch.linalg.pinv(layer.weight.detach()).T for layer in module]
    forward, grad = forward.with_feedback(inverses, layered=True), torch.randn(6, 4, dtype=torch.float64)
    seen: list[Tensor] = []
    gradients = forward.gradients
    forward.gradients = lambda signals, *args: (seen.extend(signals), gradients(signals, *args))[1]  # type: ignore
    DifferenceTargetPropagation(nudge).teach(forward, grad)
    for i, (t, j) in enumerate(zip(seen, forward.jacobians())):
        assert close(t, torch.linalg.solve(j, grad.unsqueeze(2)).squeeze(2), 1e-9)
        reached = module[i + 1 :](forward.v[i] - nudge * t)
        assert close(reached, forward.output - nudge * grad, 1e-9)


@nets
def test_it_is_no_backprop_in_disguise(name: str) -> None:
    forward, grad, _ = bound(name)
    assert degrees(updates(DifferenceTargetPropagation(), forward, grad), updates(Backprop(), forward, grad)) > 20
    forward, grad, _ = bound(name, init="weights")
    true = updates(Backprop(), forward, grad)
    assert (updates(DifferenceTargetPropagation(), forward, grad) - true).norm() > 1e-2 * true.norm()


# Inverses


def noise_of(seed: int) -> Callable[[tuple[int, int]], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)


@nets
def test_one_layer_back_is_the_transpose_of_one_forth(name: str) -> None:
    forward, _, _ = bound(name)
    noise = noise_of(0)
    changes = [noise((5, v[0].numel())).view_as(v) for v in forward.v]
    answers = [forward.passed_on(i, h) for i, h in enumerate(forward.one_forth(changes))]
    errors = [noise((5, a[0].numel())).view_as(a) for a in answers]
    weights = [w for w in forward.layer_weights() if w is not None]
    there = sum((a * e).sum() for a, e, hears in zip(answers, errors, forward.hears) if hears)
    back = sum((a * c).sum() for a, c in zip(forward.one_back(errors, weights), changes))
    assert abs(there) > 1e-3 and close(there, back, 1e-10)


def test_a_chain_and_any_network_go_alike() -> None:
    (chain, _, _), (general, _, _) = bound("mlp"), bound("mlp", general=True)
    noise = noise_of(0)
    changes = [noise(v.shape) for v in chain.v]
    for a, b in zip(chain.one_forth(changes), general.one_forth(changes)):
        assert torch.allclose(a, b, atol=1e-12)
    for a, b in zip(chain.one_back(changes, chain.feedback), general.one_back(changes, chain.feedback)):
        assert torch.allclose(a, b, atol=1e-12)


def test_the_gradient_is_that_of_the_reconstruction_loss() -> None:
    """By autograd of the loss itself, F and G as functions, at a noise of 1e-4."""
    forward, _, net = bound("mlp")
    weights, biases = zip(*((p.weight.detach(), p.bias.detach()) for p in net.module if isinstance(p, nn.Linear)))
    phis, sigma, samples = (torch.tanh, F.softplus), 1e-4, 5
    found = DifferenceReconstruction().gradient(forward, noise_of(3))
    noise = noise_of(3)
    forth = [noise(v.shape) for v in forward.v]
    back = [None, *(noise(v.shape) for v in forward.v[1:])]
    for i in (1, 2):
        b = forward.feedback[i].detach().requires_grad_()
        phi, v, above = phis[i - 1], forward.v[i - 1], forward.v[i]

        def f(state: Tensor, i: int = i, phi: Any = phi) -> Tensor:
            return F.linear(phi(state), weights[i], biases[i])

        def g(t: Tensor, b: Tensor = b, phi: Any = phi, v: Tensor = v, above: Tensor = above) -> Tensor:
            return phi(v + (t - above) @ b)

        eps, eta = sigma * forth[i - 1], sigma * back[i]
        loss = -2 * (eps * (g(f(v + eps)) - g(f(v)))).sum() + (g(f(v) + eta) - g(f(v))).square().sum()
        (true,) = torch.autograd.grad(loss / samples / sigma**2 / 2, b)
        assert close(found[i], true, 1e-3)
    assert not found[0].any()


@nets
def test_on_the_average_they_go_to_the_weights_as_far_as_units_can_send(name: str) -> None:
    """(B − W)⟨MMᵀ⟩, and nothing of a layer that hears the input alone."""
    forward, _, _ = bound(name)
    draws = torch.stack([torch.cat([g.flatten() for g in DifferenceReconstruction().gradient(forward, noise)])
                         for noise in map(noise_of, range(300))])  # fmt: skip
    expected, generator = [], noise_of(1)
    for i, (b, w) in enumerate(zip(forward.feedback, forward.layer_weights())):
        if not forward.hears[i]:
            expected.append(torch.zeros_like(b))
            continue
        total = torch.zeros_like(b)
        for _ in range(300):  # M is sampled, W − B is not
            heard = forward.one_forth([generator((5, v[0].numel())).view_as(v) for v in forward.v])[i]
            ones = forward.correlation(i, torch.ones_like(forward.passed_on(i, heard)), torch.ones_like(heard))
            lag = forward.with_feedback([b - w if k == i else t for k, t in enumerate(forward.feedback)], layered=True)
            total += lag.correlation(i, _through(lag, i, heard), heard) / ones.clamp_min(1)
        expected.append(total / 300)
    mean, spread = draws.mean(0), draws.std(0) / math.sqrt(300)
    wanted = torch.cat([t.flatten() for t in expected])
    assert float((mean - wanted).norm()) < 3 * float(spread.norm()) < 0.5 * float(wanted.norm())


def _through(forward: ForwardPass, index: int, heard: Tensor) -> Tensor:
    """What B_i, instead of W_i, would make of what a layer hears: the transpose of its way back."""
    shaped = forward.passed_on(index, heard)
    probe = torch.zeros_like(shaped).requires_grad_()
    with torch.enable_grad():
        layer = forward.feedback[index].detach()
        if layer.dim() == 2:
            return heard @ layer.T
        with_b = forward.record.segments[index].layer  # type: ignore[attr-defined]
        (found,) = torch.autograd.grad((with_b.pulled_through(layer, forward.frame, [probe])[0] * heard).sum(), probe)  # type: ignore
    return found


@nets
def test_noise_brings_them_to_the_weights(name: str) -> None:
    _, _, net = bound(name)
    _, x, _ = made(name)
    settings = FeedbackLearning(
        DifferenceReconstruction(draws=4), lr=0.2, optimizer="sgd", weight_decay=0.0, clip_norm=None
    )
    learner = FeedbackLearner(net, settings)

    def angle() -> float:
        forward = net.bound(net.observe(x))
        pairs = [(b, w) for b, w, hears in zip(forward.feedback, forward.layer_weights(), forward.hears) if hears]
        return degrees(*(torch.cat([t.flatten() for t in each]) for each in zip(*pairs)))

    before = angle()
    with torch.no_grad():
        for k in range(150):
            learner.learning = replace(settings, lr=0.2 / (1 + k / 30))
            learner.step(net.observe(x))
    assert before > 60 and angle() < 0.5 * before


# Learning


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 8, 2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Flatten(), nn.Linear(48, 3),
    )  # fmt: skip


@pytest.mark.parametrize("net", ["chain", "chain, bf16-mixed", "convolutional"])
def test_it_learns_what_holds_for_data_it_has_not_seen(net: str) -> None:
    module = Innocent(lr=0.01)
    if net == "convolutional":
        module.net = conv()
    s = strategy(rule=DifferenceTargetPropagation(), feedback=None)
    precision = "bf16-mixed" if net.endswith("mixed") else "32-true"
    quiet(s, max_epochs=3, precision=precision).fit(module, loader(clusters(size=320), batch_size=16))
    x, y = clusters(size=400, seed=5)[:]
    assert (module.eval()(x).argmax(1) == y).float().mean() > 0.9
    assert s.learner.steps == 20 + 3 * 20  # a pass to begin with, then a step a batch


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DifferenceTargetPropagation(0.0), r"nudge=0\.0.*above zero"),
        (lambda: DifferenceTargetPropagation(math.inf), "nudge=inf"),
        (lambda: DifferenceReconstruction(draws=0), "draws=0"),
    ],
)
def test_settings_without_sense_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
