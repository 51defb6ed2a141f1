"""Least control and predictive coding, against autograd of the energy, closed forms and known limits."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from cases.chains import close
from cases.through import NETS, made, swapped
from torch import Tensor, nn

from dfc_lightning import (
    ControlError,
    ControlledNetwork,
    LearningRule,
    LeastControl,
    PredictiveCoding,
    Update,
)
from dfc_lightning.rules.least_control import THROUGH
from dfc_lightning.settling import Descent, Equilibrium

EXACT = Equilibrium(rtol=1e-12, max_iterations=200)
nets = pytest.mark.parametrize("name", NETS)
generals = pytest.mark.parametrize("general", [False, True], ids=["", "general"])
Loss = Callable[[Tensor, Tensor], Tensor]
"""Of each sample, (B,)."""


def cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output, y, reduction="none", label_smoothing=0.2)


def squared(output: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (output - F.one_hot(y, output.shape[1])).square().sum(1)


LOSSES: dict[str, Loss] = {"softmax": cross_entropy, "identity": squared}
losses = pytest.mark.parametrize("link", LOSSES)


def smooth(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A network without kinks: their equilibrium is the subject of tests of its own."""
    module, x, y = made(name)
    if name != "mlp":
        module = Smooth(module)
    return module, x, y


class Smooth(nn.Module):
    """A network with softplus in the place of ReLU, and mean-pooling in that of max-pooling."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        n = self.inner
        if hasattr(n, "head"):
            return n.head(torch.tanh(n.c2(F.avg_pool2d(F.softplus(n.c1(x)), 3, 1, 1))).flatten(1))
        h = torch.tanh(n.n1(n.c1(x)))
        h = F.silu(n.c2(h) + n.short(h))
        h = F.softplus(h + n.c3(h)).mean((2, 3))
        return n.b(h) - 0.5 * n.side(torch.tanh(h))


def taught(net: ControlledNetwork, rule: LearningRule, x: Tensor, y: Tensor, loss: Loss) -> tuple[Tensor, Update]:
    net.module.zero_grad()
    with net.taught_by(rule) as lesson:
        value = loss(net(x), y).mean()
    value.backward()
    assert lesson.update is not None
    return flat(net.module), lesson.update


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters()])


def backprop(module: nn.Module, x: Tensor, y: Tensor, loss: Loss) -> Tensor:
    module.zero_grad()
    loss(module(x), y).mean().backward()
    return flat(module)


def driven(module: nn.Module, names: Sequence[str], added: Sequence[Tensor], x: Tensor) -> Tensor:
    """The output where something is added to what each layer returns: its voltage, or what is normalised to it."""
    handles = [module.get_submodule(n).register_forward_hook(lambda _, __, v, a=a: v + a) for n, a in zip(names, added)]
    try:
        return module(x)
    finally:
        for handle in handles:
            handle.remove()


def voltages_at(net: ControlledNetwork) -> list[str]:
    """The module that returns each point's voltage."""
    renamed = {"inner.c1": "inner.n1"} if hasattr(net.module, "inner") and hasattr(net.module.inner, "n1") else {}
    return [renamed.get(point.name, point.name) for point in net.points]


def energy(
    net: ControlledNetwork, x: Tensor, y: Tensor, loss: Loss, weight: float, at: Sequence[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """½ Σ ‖a_i‖² + weight · ℓ, its gradient by the parameters, of the batch mean, and by a, of each sample."""
    leaves = [a.detach().clone().requires_grad_() for a in at]
    net.module.zero_grad()
    output = driven(net.module, voltages_at(net), leaves, x)
    each = weight * loss(output, y) + sum(0.5 * a.square().flatten(1).sum(1) for a in leaves)
    each.mean().backward()
    return each.detach(), flat(net.module), [a.grad * len(x) for a in leaves]


# At the equilibrium


@nets
@generals
@losses
@pytest.mark.parametrize("alpha", [3.0, 0.3])
def test_least_control_is_where_the_energy_is_stationary_and_teaches_its_gradient(name, general, link, alpha):
    module, x, y = smooth(name)
    net = ControlledNetwork(module, general=general)
    rule = LeastControl(alpha=alpha, relative=False, equilibrium=EXACT, link=link)
    found, update = taught(net, rule, x, y, LOSSES[link])
    assert update.settled.converged.all()
    _, by_weights, by_drive = energy(net, x, y, LOSSES[link], 1 / alpha, update.settled.response.driven)
    assert max(float(g.abs().max()) for g in by_drive) < 1e-9
    if name != "residual":  # whose normalisation learns by its derivative at the feedforward state
        assert close(found, by_weights, 1e-8)
    if alpha < 1:
        plain = backprop(module, x, y, LOSSES[link])
        assert F.cosine_similarity(found, plain, dim=0) < 0.9997  # and it is not the gradient of the loss


@nets
@losses
@pytest.mark.parametrize("nudge", [0.5, -0.2])
def test_predictive_coding_is_where_its_energy_is_stationary(name, link, nudge):
    module, x, y = smooth(name)
    net = ControlledNetwork(module)
    rule = PredictiveCoding(EXACT, nudge=abs(nudge), link=link, centred=nudge < 0)
    found, update = taught(net, rule, x, y, LOSSES[link])
    ends = net.observe(x).outputs_at
    a = update.settled.response.driven
    assert not any(a[i].any() for i in ends)
    _, by_weights, by_drive = energy(net, x, y, LOSSES[link], abs(nudge), a)
    assert max(float(g.abs().max()) for i, g in enumerate(by_drive) if i not in ends) < 1e-9
    if nudge > 0 and name != "residual":
        assert close(found * nudge, by_weights, 1e-8)
    if nudge > 0:
        assert F.cosine_similarity(found, backprop(module, x, y, LOSSES[link]), dim=0) < 0.9999


@pytest.mark.parametrize("rule", ["least control", "predictive coding"])
def test_what_is_taught_is_the_gradient_of_the_least_energy_by_finite_differences(rule):
    module, x, y = smooth("conv")
    rules = {
        "least control": LeastControl(alpha=0.5, relative=False, equilibrium=EXACT, link="softmax"),
        "predictive coding": PredictiveCoding(EXACT, nudge=2.0, link="softmax"),
    }
    weight = 2.0

    def least() -> tuple[float, Tensor]:
        net = ControlledNetwork(module)
        found, update = taught(net, rules[rule], x, y, cross_entropy)
        value, _, _ = energy(net, x, y, cross_entropy, weight, update.settled.response.driven)
        return float(value.mean()), found * (1 if rule == "least control" else weight)

    _, gradient = least()
    torch.manual_seed(1)
    way = [torch.randn_like(p) for p in module.parameters()]
    ends = []
    for step in (1e-5, -2e-5):
        for p, d in zip(module.parameters(), way):
            p.data += step * d
        ends.append(least()[0])
    slope = (ends[0] - ends[1]) / 2e-5
    assert slope == pytest.approx(float(gradient @ torch.cat([d.flatten() for d in way])), rel=1e-6)


def test_on_a_linear_chain_the_control_is_known():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)).double()
    x, y, alpha = torch.randn(4, 6, dtype=torch.float64), torch.arange(4) % 3, 0.7
    rule = LeastControl(alpha=alpha, relative=False, equilibrium=EXACT, link="identity")
    _, update = taught(ControlledNetwork(module), rule, x, y, squared)
    w2, w3 = module[1].weight, module[2].weight
    jacobians = [w3 @ w2, w3, torch.eye(3, dtype=torch.float64)]
    inverse = torch.linalg.inv(sum(j @ j.T for j in jacobians) + alpha * torch.eye(3, dtype=torch.float64))
    u = (F.one_hot(y, 3) - module(x)) @ inverse.T
    for a, j in zip(update.settled.response.driven, jacobians):
        assert close(a, u @ j, 1e-11)


# Inference by steps


@nets
@pytest.mark.parametrize(("steps", "rate"), [(1, 1.0), (4, 0.3)])
def test_steps_of_inference_are_gradient_steps_on_the_energy(name, steps, rate):
    module, x, y = smooth(name)
    net = ControlledNetwork(module)
    found, update = taught(net, PredictiveCoding(Descent(steps, rate), nudge=0.8, link="softmax"), x, y, cross_entropy)
    forward = net.observe(x)
    ends, a = forward.outputs_at, [torch.zeros_like(v) for v in forward.v]
    for _ in range(steps):
        slopes = energy(net, x, y, cross_entropy, 0.8, a)[2]
        a = [each if i in ends else each - rate * g for i, (each, g) in enumerate(zip(a, slopes))]
    for mine, theirs in zip(update.settled.response.driven, a):
        assert close(mine, theirs, 1e-10)
    assert update.settled.iterations == steps
    if name == "mlp":  # and what teaches is the error itself, at the state that has been reached
        share = 1 - (1 - rate) ** steps
        rates = [x]
        handles = [
            m.register_forward_pre_hook(lambda _, i: rates.append(i[0].detach())) for m in (module[2], module[4])
        ]
        output = driven(module, voltages_at(net), a, x).detach().requires_grad_()
        for handle in handles:
            handle.remove()
        (error,) = torch.autograd.grad(cross_entropy(output, y).sum(), output)
        signals = [-a[0] / 0.8 / share, -a[1] / 0.8 / share, error]
        theirs = [g for t, r in zip(signals, rates) for g in ((t.T @ r / 5).flatten(), t.mean(0))]
        assert close(found, torch.cat(theirs), 1e-10)


# The limits


class Normalised(nn.Module):
    """Convolutions with batch statistics and a shortcut."""

    shape = (2, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.c2, self.n2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.a = nn.Linear(4, 3)

    def forward(self, x: Tensor, phi: Callable[[Tensor], Tensor] = torch.tanh) -> Tensor:
        h = phi(self.n1(self.c1(x)))
        return self.a(phi(h + self.n2(self.c2(h))).mean((2, 3)))


def normalised() -> tuple[Normalised, Tensor, Tensor]:
    """Samples of very different size."""
    torch.manual_seed(0)
    module, y = Normalised().double(), torch.arange(6) % 3
    x = torch.randn(6, 1, 1, 1, dtype=torch.float64).exp() * torch.randn(6, 2, 6, 6, dtype=torch.float64)
    return module, x, y


@pytest.mark.parametrize(
    "rule",
    [
        LeastControl(alpha=1e9, link="softmax"),
        LeastControl(alpha=1e9, relative=False, link="softmax"),
        PredictiveCoding(EXACT, nudge=1e-8, link="softmax"),
        PredictiveCoding(Descent(3, 0.2), nudge=1e-8, link="softmax"),
    ],
    ids=["least control", "as published", "predictive coding", "by steps"],
)
def test_batch_statistics_follow_their_batch_in_what_is_taught(rule):
    module, x, y = normalised()
    found, _ = taught(ControlledNetwork(module), rule, x, y, cross_entropy)
    factor = 1e9 if isinstance(rule, LeastControl) and not rule.relative else 1.0
    assert close(found * factor, backprop(module, x, y, cross_entropy), 1e-5)


def held(module: Normalised, x: Tensor) -> Normalised:
    """The same network with the statistics of this batch held."""
    twin = copy.deepcopy(module)
    for norm in (twin.n1, twin.n2):
        norm.momentum = 0.0

    def note(norm: nn.Module, given: tuple[Tensor]) -> None:
        variance, mean = torch.var_mean(given[0].detach(), (0, 2, 3), correction=0)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)

    handles = [norm.register_forward_pre_hook(note) for norm in (twin.n1, twin.n2)]
    twin(x)
    for handle in handles:
        handle.remove()
    return twin.eval()


@pytest.mark.parametrize(
    "rule",
    [
        LeastControl(alpha=0.5, relative=False, equilibrium=EXACT, link="softmax"),
        PredictiveCoding(EXACT, nudge=1.0, link="softmax"),
        PredictiveCoding(Descent(3, 0.3), nudge=1.0, link="softmax"),
    ],
    ids=["least control", "predictive coding", "by steps"],
)
def test_with_batch_statistics_the_error_and_the_slopes_are_those_of_the_driven_network_and_the_rest_is_backprop(rule):
    module, x, y = normalised()
    found, update = taught(ControlledNetwork(module), rule, x, y, cross_entropy)
    slopes: list[Tensor] = []

    def noted(v: Tensor) -> Tensor:
        slopes.append(1 - v.detach().tanh().square())
        return v.tanh()

    inner = held(module, x)
    forward = inner.forward
    inner.forward = lambda x: forward(x, noted)  # type: ignore[method-assign]
    output = driven(inner, ["n1", "n2", "a"], update.settled.response.driven, x).detach().requires_grad_()
    (error,) = torch.autograd.grad(cross_entropy(output, y).sum(), output)
    left = iter(slopes)
    module.zero_grad()
    fed = module(x, lambda v: v.tanh().detach() + next(left) * (v - v.detach()))
    (fed * error).sum().div(len(x)).backward()
    factor = rule.alpha if isinstance(rule, LeastControl) else 1.0
    assert close(found * factor, flat(module), 1e-9)
    assert F.cosine_similarity(found, backprop(module, x, y, cross_entropy), dim=0) < 0.9999


@pytest.mark.parametrize(
    "rule",
    [*(LeastControl(through, link="softmax") for through in THROUGH), PredictiveCoding(link="softmax")],
    ids=[*THROUGH, "predictive coding"],
)
def test_no_weight_learns_the_scale_that_batch_statistics_take_out_again(rule):
    module, x, y = normalised()
    taught(ControlledNetwork(module, seed=0), rule, x, y, cross_entropy)
    for layer in (module.c1, module.c2):  # to the ε of the normalisation
        assert abs(F.cosine_similarity(layer.weight.flatten(), layer.weight.grad.flatten(), dim=0)) < 1e-4


@nets
@generals
def test_control_too_leaky_to_move_the_network_is_backprop(name, general):
    module, x, y = made(name)
    found, _ = taught(
        ControlledNetwork(module, general=general), LeastControl(alpha=1e9, link="softmax"), x, y, cross_entropy
    )
    assert close(found, backprop(module, x, y, cross_entropy), 1e-7)


@pytest.mark.parametrize("inference", [EXACT, Descent(1, 1.0), Descent(3, 0.2)])
@pytest.mark.parametrize(("centred", "order"), [(False, 1), (True, 2)])
def test_a_small_nudge_is_backprop_to_first_order_and_to_second_if_centred(inference, centred, order):
    module, x, y = smooth("conv")
    true, apart = backprop(module, x, y, cross_entropy), []
    for nudge in (1e-2, 5e-3):
        rule = PredictiveCoding(inference, nudge, centred, link="softmax")
        apart.append(float((taught(ControlledNetwork(module), rule, x, y, cross_entropy)[0] - true).norm()))
    assert apart[0] / apart[1] == pytest.approx(2.0**order, rel=0.05)


def test_errors_through_equal_weights_are_exact_and_through_others_are_theirs():
    module, x, y = smooth("conv")

    def through(back: str) -> tuple[Tensor, ControlledNetwork, Update]:
        net = ControlledNetwork(module, seed=0)
        rule = LeastControl("kolen_pollack", alpha=0.5, relative=False, equilibrium=EXACT, link="softmax")
        taught(net, rule, x, y, cross_entropy)  # makes B
        if back == "weights":
            for b, point in zip(net.feedback, net.points):
                b.data.copy_(point.weight.data)
        found, update = taught(net, rule, x, y, cross_entropy)
        return found, net, update

    exact = LeastControl(alpha=0.5, relative=False, equilibrium=EXACT, link="softmax")
    assert close(through("weights")[0], taught(ControlledNetwork(module), exact, x, y, cross_entropy)[0], 1e-9)
    _, net, update = through("random")
    a = update.settled.response.driven
    leaves = [each.detach().clone().requires_grad_() for each in a]
    twin = swapped(module, [p.name for p in net.points], list(net.feedback))
    cross_entropy(driven(twin, voltages_at(net), leaves, x), y).sum().backward()
    for each, leaf in zip(a, leaves):
        assert close(each, -leaf.grad / 0.5, 1e-9)


def test_learned_feedback_drives_straight_from_the_output():
    module, x, y = smooth("mlp")
    net = ControlledNetwork(module, seed=0)
    rule = LeastControl("learned", alpha=0.5, relative=False, equilibrium=EXACT, link="softmax")
    _, update = taught(net, rule, x, y, cross_entropy)
    u, a = update.settled.control, update.settled.response.driven
    assert all(close(each, u @ q.T, 1e-10) for each, q in zip(a, net.feedback))
    output = driven(module, voltages_at(net), a, x).detach().requires_grad_()
    (grad,) = torch.autograd.grad(cross_entropy(output, y).sum(), output)
    assert close(-grad, 0.5 * u, 1e-9)


# Kinks, failures, and samples on their own


@pytest.mark.parametrize("name", ["conv", "residual"])
def test_on_kinks_no_small_step_lowers_the_energy(name):
    module, x, y = made(name)
    net = ControlledNetwork(module)
    rule = LeastControl(alpha=0.2, relative=False, equilibrium=Equilibrium(3e-3, 400), link="softmax")
    settled = taught(net, rule, x, y, cross_entropy)[1].settled
    assert settled.converged.all()
    a = [each.detach() for each in settled.response.driven]
    names = {"c1": "n1"} if name == "residual" else {}

    def value(at: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            output = driven(module, [names.get(p.name, p.name) for p in net.points], at, x)
            return cross_entropy(output, y) / 0.2 + sum(0.5 * t.square().flatten(1).sum(1) for t in at)

    least = value(a)
    torch.manual_seed(2)
    for size, _ in itertools.product((1e-2, 1e-3), range(50)):
        near = [t + size * torch.randn_like(t) for t in a]
        assert (value(near) > least - 1e-4 * size).all()


def test_a_sample_settles_alike_in_any_company():
    module, x, y = made("conv")
    rule = LeastControl(alpha=0.1, link="softmax")
    net = ControlledNetwork(module)
    together = taught(net, rule, x, y, cross_entropy)[1].settled
    for i in range(len(x)):
        alone = taught(ControlledNetwork(module), rule, x[i : i + 1], y[i : i + 1], cross_entropy)[1].settled
        for a, b in zip(together.response.driven, alone.response.driven):
            assert close(a[i : i + 1], b, 1e-9)
        assert together.residual[i] == pytest.approx(float(alone.residual), abs=1e-9)


def test_a_nudge_beyond_what_the_energy_bears_is_reported_and_leaves_no_infinity():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).double()
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.arange(4) % 3
    module[1].weight.data *= 10
    found, update = taught(
        ControlledNetwork(module), PredictiveCoding(Descent(50, 1.0), nudge=5.0, link="identity"), x, y, squared
    )
    assert not update.settled.converged.any()
    assert torch.isfinite(found).all() and not found.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LeastControl("sideways"), "through='sideways'.*choose one of"),
        (lambda: LeastControl(alpha=0.0), "alpha=0.0.*above zero"),
        (lambda: LeastControl(link="cosine"), "link='cosine'.*choose one of"),
        (lambda: LeastControl("kolen_pollack", decay=-1.0), "tracking=-1.0"),
        (lambda: PredictiveCoding(nudge=0.0), "nudge=0.0.*above zero"),
        (lambda: PredictiveCoding(Descent(0)), "steps=0.*at least one"),
        (lambda: Descent(3, 1.5), "rate=1.5"),
        (lambda: Equilibrium(rtol=0.0), "rtol=0.0"),
        (lambda: Equilibrium(max_iterations=1), "max_iterations=1"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("rule", [LeastControl(link="softmax"), PredictiveCoding(link="softmax")])
def test_a_loss_that_tells_no_label_is_refused(rule):
    module, x, y = made("mlp")
    with pytest.raises(ControlError, match="cross entropy"):
        taught(ControlledNetwork(module), rule, x, y, squared)
