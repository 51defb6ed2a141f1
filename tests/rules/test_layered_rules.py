"""Rules with layerwise feedback, against autograd with replaced weights, dense Jacobians and closed forms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from cases.chains import close
from cases.through import NETS, made, swapped
from torch import Tensor, nn

from dfc_lightning import (
    ControlledNetwork,
    FeedbackAlignment,
    ForwardGradient,
    KolenPollack,
    LayeredDFC,
    Layerwise,
    LearningRule,
    MinimumNorm,
    PIController,
    SignSymmetry,
    Tracking,
    Update,
    WeightMirror,
)
from dfc_lightning.metrics import control_matrix
from dfc_lightning.network.initial_feedback import xavier_spread
from dfc_lightning.settling import Euler, Linearized, SteadyState, Trajectory

nets = pytest.mark.parametrize("name", NETS)
generals = pytest.mark.parametrize("general", [False, True], ids=["", "general"])
EXACT = SteadyState(rtol=1e-12, max_iterations=60)


class Copied(LayeredDFC):
    """From a copy of the weights."""

    feedback: ClassVar[Layerwise] = Layerwise(init="weights")


class Aligned(KolenPollack):
    """From a copy of the weights."""

    @property
    def feedback(self) -> Layerwise:
        return Layerwise(init="weights", tracking=self.decay)


def taught(net: ControlledNetwork, rule: LearningRule, x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], Update]:
    net.module.zero_grad()
    with net.taught_by(rule) as lesson:
        loss = F.cross_entropy(net(x), y)
    loss.backward()
    assert lesson.update is not None
    return {n: p.grad.clone() for n, p in net.module.named_parameters()}, lesson.update


def through(module: nn.Module, names: list[str], back: list[Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Autograd's gradients with the layers' errors travelling back through ``back``."""
    module.zero_grad()
    twin = swapped(module, names, back)
    F.cross_entropy(twin(x), y).backward()
    return {n.replace(".layer.", "."): p.grad.clone() for n, p in twin.named_parameters()}


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[n].flatten() for n in sorted(gradients)])


def turned(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return float(torch.rad2deg(torch.acos(F.cosine_similarity(flat(a), flat(b), dim=0).clamp(-1, 1))))


# Errors through other weights


@nets
@generals
@pytest.mark.parametrize(
    "rule", [FeedbackAlignment(), KolenPollack(), WeightMirror()], ids=lambda rule: type(rule).__name__
)
def test_errors_travel_back_through_the_feedback_weights(name, general, rule):
    module, x, y = made(name)
    net = ControlledNetwork(module, seed=0, general=general)
    found, _ = taught(net, rule, x, y)
    theirs = through(module, [p.name for p in net.points], [b.detach() for b in net.feedback], x, y)
    assert close(flat(found), flat(theirs), 1e-10)
    true = through(module, [p.name for p in net.points], [p.weight for p in net.points], x, y)
    assert turned(found, true) > 15  # and it is not the gradient


@nets
@generals
@pytest.mark.parametrize("variant", ["uniform", "batch_random", "fixed_random"])
def test_sign_symmetry_keeps_the_signs_alone(name, general, variant):
    module, x, y = made(name)
    net = ControlledNetwork(module, seed=0, general=general)
    rule, names = SignSymmetry(variant), []
    net.observe(x)
    names = [p.name for p in net.points]
    weights = [p.weight.detach() for p in net.points]
    found, _ = taught(net, rule, x, y)
    if variant == "uniform":
        back = [w.sign() * xavier_spread(w) for w in weights]
        fans = [nn.init._calculate_fan_in_and_fan_out(w) for w in weights]
        assert [xavier_spread(w) for w in weights] == pytest.approx([(2 / sum(f)) ** 0.5 for f in fans])
    elif variant == "fixed_random":
        back = [w.sign() * b.detach().abs() for w, b in zip(weights, net.feedback)]
        assert taught(net, rule, x, y)[0].keys() == found.keys()
        assert close(flat(taught(net, rule, x, y)[0]), flat(found), 1e-12)  # the draws stay
    else:
        again, other = taught(net, rule, x, y)[0], ControlledNetwork(module, seed=0, general=general)
        assert turned(found, again) > 1  # new draws for each batch
        other.lessons = 1
        assert close(flat(taught(other, rule, x, y)[0]), flat(again), 1e-12)  # which follow from its number
        return
    assert close(flat(found), flat(through(module, names, back, x, y)), 1e-10)
    assert turned(found, through(module, names, weights, x, y)) > 5


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="variant='uSF'.*uniform"):
        SignSymmetry("uSF")


# Kolen-Pollack


def optimizers() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    return {
        "sgd": lambda p: torch.optim.SGD(p, 0.1),
        "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.02),
        "adam": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=0.1),
        "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.3),
        "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-2, momentum=0.5),
    }


def groups(module: nn.Module) -> list[dict[str, object]]:
    """Two groups with rates of their own."""
    parameters = list(module.parameters())
    return [{"params": parameters[:3]}, {"params": parameters[3:], "lr": 0.02}]


@nets
@pytest.mark.parametrize("kind", optimizers())
def test_from_a_copy_of_the_weights_kolen_pollack_is_backprop_whatever_the_optimizer(name, kind):
    module, x, y = made(name)
    twin = copy.deepcopy(module)
    mine, theirs = (optimizers()[kind](groups(m)) for m in (module, twin))
    net = ControlledNetwork(module, seed=0)
    tracking = Tracking(net, [mine])
    for _ in range(6):
        for group in (*mine.param_groups, *theirs.param_groups):
            group["lr"] *= 0.9
        taught(net, Aligned(0.0), x, y)
        mine.step()
        twin.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        theirs.step()
    assert all(close(a, b, 1e-10) for a, b in zip(module.parameters(), twin.parameters()))
    for point, b, carries in zip(net.points, net.feedback, net.weights.carrying):
        assert close(b, point.weight, 1e-12) == carries  # B of the first layer has no use, and stays
    tracking.close()
    taught(net, Aligned(0.0), x, y)
    mine.step()
    assert not close(net.feedback[-1], net.points[-1].weight, 1e-12)


@nets
def test_the_feedback_comes_to_the_weights_at_the_rate_of_the_decay(name):
    module, x, y = made(name)
    net = ControlledNetwork(module, seed=0)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    Tracking(net, [optimizer], decay=0.5)
    taught(net, KolenPollack(0.5), x, y)
    before = [(b - p.weight).detach() for b, p in zip(net.feedback, net.points)]
    left = 1.0
    for step in range(8):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        taught(net, KolenPollack(0.5), x, y)
        optimizer.step()
        left *= 1 - 0.5 * 0.1 / (1 + step)
    for was, b, point, carries in zip(before, net.feedback, net.points, net.weights.carrying):
        if carries:
            assert close(b - point.weight, was * left, 1e-10)


def test_it_starts_where_the_optimizer_is():
    """Moments that the weights have had before are the feedback weights' too."""
    module, x, y = made("mlp")
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
    net = ControlledNetwork(module, seed=0)
    Tracking(net, [optimizer])
    for _ in range(3):
        taught(net, Aligned(0.0), x, y)
        optimizer.step()
    assert close(net.feedback[-1], net.points[-1].weight, 1e-12)


def test_following_goes_on_from_a_saved_state():
    module, x, y = made("mlp")

    def run(module: nn.Module, optimizer: torch.optim.Optimizer, net: ControlledNetwork, steps: int) -> None:
        for _ in range(steps):
            taught(net, KolenPollack(0.1), x, y)
            optimizer.step()

    optimizer, net = torch.optim.Adam(module.parameters(), 1e-2), ControlledNetwork(module, seed=0)
    tracking = Tracking(net, [optimizer], 0.1)
    run(module, optimizer, net, 3)
    saved = copy.deepcopy((module.state_dict(), optimizer.state_dict(), net.state_dict(), tracking.state_dict()))
    run(module, optimizer, net, 3)
    other = NETS["mlp"]().double()
    theirs, its = torch.optim.Adam(other.parameters(), 1e-2), ControlledNetwork(other, seed=5)
    other.load_state_dict(saved[0]), theirs.load_state_dict(saved[1]), its.load_state_dict(saved[2], Layerwise())
    Tracking(its, [theirs], 0.1).load_state_dict(saved[3])
    run(other, theirs, its, 3)
    for a, b in zip((*module.parameters(), *net.feedback), (*other.parameters(), *its.feedback)):
        assert torch.equal(a, b)


def test_what_searches_its_steps_cannot_be_followed():
    module, _, _ = made("mlp")
    with pytest.raises(Exception, match="LBFGS.*SGD or Adam"):
        Tracking(ControlledNetwork(module), [torch.optim.LBFGS(module.parameters())])


# Control through layered feedback


def jacobians(net: ControlledNetwork, x: Tensor, back: list[Tensor] | None = None) -> Tensor:
    """J of each sample, (B, n_L, Σ n_i), by a row of errors at a time through autograd, with W or other weights."""
    module = net.module if back is None else swapped(net.module, [p.name for p in net.points], back)
    seen: list[Tensor] = []
    layers = [p.norm or p.layer for p in net.points] if back is None else []
    if back is not None:
        layers = [module.get_submodule(_named(net, p)) for p in net.points]
    hooks = [layer.register_forward_hook(lambda m, a, out: seen.append(out)) for layer in layers]
    output = module(x)
    for hook in hooks:
        hook.remove()
    rows = []
    for k in range(output.shape[1]):
        found = torch.autograd.grad(output[:, k].sum(), seen, retain_graph=True)
        rows.append(torch.cat([g.flatten(1) for g in found], dim=1))
    return torch.stack(rows, dim=1)


def _named(net: ControlledNetwork, point: object) -> str:
    """The module whose output is the point's voltage."""
    norm = point.norm  # type: ignore[attr-defined]
    return next((n for n, m in net.module.named_modules() if norm is not None and m is norm), point.name)  # type: ignore[attr-defined]


@nets
@generals
def test_the_gain_is_that_of_dense_jacobians(name, general):
    module, x, y = made(name)
    net = ControlledNetwork(module, seed=0, general=general)
    taught(net, FeedbackAlignment(), x, y)
    forward = net.bound(net.observe(x))
    j, k = jacobians(net, x), jacobians(net, x, [b.detach() for b in net.feedback])
    assert close(torch.cat(forward.feedback_rows(), dim=2), k, 1e-10)
    assert close(forward.gain(), j @ k.mT, 1e-10)
    u = torch.randn(len(x), j.shape[1], dtype=x.dtype)
    apical = torch.cat([a.flatten(1) for a in forward.apical(u)], dim=1)
    assert close(apical, (u.unsqueeze(1) @ k).squeeze(1), 1e-10)
    unit = forward.in_unit(u)
    gained = (j @ k.mT @ u.unsqueeze(2)).squeeze(2)
    assert close(unit.unit.size, gained.norm(dim=1, keepdim=True) / u.norm(dim=1, keepdim=True), 1e-10)
    assert close(unit.gain(), j @ k.mT / unit.unit.size.unsqueeze(2), 1e-10)
    some = torch.tensor([1, 3])
    assert close(unit.samples(some).gain(), unit.gain()[some], 1e-10)


@nets
@generals
def test_from_a_copy_of_the_weights_the_first_order_is_the_damped_minimum_norm_update(name, general):
    module, x, y = made(name)
    net = ControlledNetwork(module, seed=0, general=general)
    for relative in (False, True):
        for alpha in (0.1, 2.0):
            rule = Copied(Linearized(), PIController(alpha), 1e-5, relative=relative)
            norm = MinimumNorm(alpha, 1e-5, "voltage_difference", relative=relative)
            assert close(flat(taught(net, rule, x, y)[0]), flat(taught(net, norm, x, y)[0]), 1e-8)
            # The steady state is that to first order in λ.
            solved = replace(rule, settling=EXACT)
            assert close(flat(taught(net, solved, x, y)[0]), flat(taught(net, norm, x, y)[0]), 1e-4)


@nets
@generals
@pytest.mark.parametrize("copied", [False, True])
def test_with_more_and_more_leakage_it_is_kolen_pollack(name, general, copied):
    module, x, y = made(name)
    net = ControlledNetwork(module, seed=0, general=general)
    kp = Aligned(0.0) if copied else KolenPollack(0.0)
    expected = taught(net, kp, x, y)[0]
    rule = (Copied if copied else LayeredDFC)(controller=PIController(1e9))
    assert close(flat(taught(net, rule, x, y)[0]), flat(expected), 1e-7)
    assert turned(taught(net, replace(rule, controller=PIController(0.01)), x, y)[0], expected) > 0.5


def test_through_batch_normalisation_too_it_is_backprop_in_the_limit():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Tanh(),
        nn.Flatten(), nn.Linear(20, 3),
    ).double()  # fmt: skip
    x, y = torch.randn(9, 2, 6, 6, dtype=torch.float64), torch.arange(9) % 3
    net = ControlledNetwork(module, seed=0)
    found = taught(net, Copied(controller=PIController(1e9)), x, y)[0]
    module.zero_grad()
    F.cross_entropy(module(x), y).backward()
    assert close(flat(found), flat({n: p.grad for n, p in module.named_parameters()}), 1e-6)


@nets
@generals
@pytest.mark.parametrize("relative", [False, True])
def test_the_steady_state_is_one_and_simulation_comes_to_it(name, general, relative):
    module, x, y = made(name)
    net = ControlledNetwork(module, seed=0, general=general)
    rule = Copied(EXACT, PIController(0.5), 0.3, relative=relative)
    gradients, update = taught(net, rule, x, y)
    settled = update.settled
    assert settled.converged.all()
    taught(net, Aligned(0.0), x, y)
    forward = net.bound(net.observe(x))
    loss_grad = (forward.output.softmax(1) - F.one_hot(y, 3)).detach()
    k = jacobians(net, x, [p.weight.detach() for p in net.points])
    offset = -0.3 * loss_grad
    size = torch.ones(len(x), 1, dtype=x.dtype)
    if relative:
        gained = (jacobians(net, x) @ (offset.unsqueeze(1) @ k).mT).squeeze(2)
        size = gained.norm(dim=1, keepdim=True) / offset.norm(dim=1, keepdim=True)
    # The network run again with K u added at its voltages, by hooks: the target is missed by α u.
    pushes = ((settled.control / size).unsqueeze(1) @ k).squeeze(1).detach()
    shapes = [v.shape[1:] for v in forward.v]
    parts = [p.view(-1, *s) for p, s in zip(pushes.split([s.numel() for s in shapes], dim=1), shapes)]
    hooks = [
        (p.norm or p.layer).register_forward_hook(lambda m, a, out, push=push: out + push)
        for p, push in zip(net.points, parts)
    ]
    driven = module(x)
    for hook in hooks:
        hook.remove()
    assert close(driven - forward.output, offset - 0.5 * settled.control, 1e-9)
    if relative:
        return
    gain = float(torch.linalg.matrix_norm(jacobians(net, x) @ k.mT, 2).max())
    euler = Euler(steps=1500, dt=min(0.05, 0.4 / gain), tau_ratio=0.2)
    simulated = taught(net, replace(rule, settling=euler), x, y)[0]
    assert close(flat(simulated), flat(gradients), 1e-4)


@nets
def test_each_sample_teaches_by_as_much_as_its_error_pulled_back(name):
    module, x, y = made(name)
    net = ControlledNetwork(module, seed=0)
    taught(net, Aligned(0.0), x, y)
    for alpha in (0.0, 0.3, 30.0):
        for k in range(len(x)):
            found = taught(net, Copied(controller=PIController(alpha)), x[k : k + 1], y[k : k + 1])[1]
            whole = taught(net, Aligned(0.0), x[k : k + 1], y[k : k + 1])[1]
            biases = [sum(t.square().sum() for each in u.gradients for t in each[1:2]) for u in (found, whole)]
            if name == "mlp":  # the bias's gradient is the signal itself
                assert biases[0] == pytest.approx(float(biases[1]), rel=1e-6)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="settling=.*SteadyState"):
        LayeredDFC(settling=Trajectory())
    with pytest.raises(ValueError, match="relative=True.*integrate=False"):
        LayeredDFC(settling=Euler(), integrate=True)
    for value in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="tracking"):
            KolenPollack(value)
    with pytest.raises(ValueError, match="init='zeros'"):
        Layerwise(init="zeros")


# Forward gradients


def test_the_mean_of_forward_gradients_is_backprop():
    module, x, y = made("mlp")
    net, total, count = ControlledNetwork(module, seed=0), 0, 1000
    for _ in range(count):
        total = total + flat(taught(net, ForwardGradient(), x, y)[0]) / count
    true = flat(through(module, [], [], x, y))
    single = flat(taught(net, ForwardGradient(), x, y)[0])
    assert (total - true).norm() < 5 * (single - true).norm() / count**0.5
    assert (single - true).norm() > 0.5 * true.norm()


@nets
@generals
def test_a_forward_gradient_is_the_slope_along_its_noise(name, general):
    """One draw, against autograd's Jacobian."""
    module, x, y = made(name)
    net = ControlledNetwork(module, seed=0, general=general)
    forward = net.observe(x)
    loss_grad = torch.randn(len(x), 3, dtype=x.dtype)
    update = ForwardGradient().teach(forward, loss_grad)
    again = net.observe(x)
    own = again.output_errors(loss_grad)
    drawing = again.chance.drawing()
    drawn = [drawing.of_samples(v.shape).to(v) if e is None else torch.zeros_like(v) for v, e in zip(again.v, own)]
    j = jacobians(net, x)
    moved = (j @ torch.cat([d.flatten(1) for d in drawn], dim=1).unsqueeze(2)).squeeze(2)
    slope = (moved * loss_grad).sum(1)
    signals = [slope.view(-1, *[1] * (d.dim() - 1)) * d if e is None else e for d, e in zip(drawn, own)]
    for found, expected in zip(update.gradients, again.gradients(signals)):
        assert all(close(a, b, 1e-10) for a, b in zip(found, expected))


@pytest.mark.parametrize(
    "rule", [ForwardGradient(), SignSymmetry("batch_random")], ids=lambda rule: type(rule).__name__
)
def test_a_monitor_that_has_a_rule_teach_again_sees_the_update_that_was_made(rule):
    module, x, y = made("mlp")
    net = ControlledNetwork(module, seed=0)
    with net.taught_by(rule) as lesson:
        loss = F.cross_entropy(net(x), y)
    loss.backward()
    again = rule.teach(lesson.forward, lesson.loss_grad)
    taught = [t for each in again.gradients for t in each]
    assert all(close(a, p.grad, 1e-12) for a, p in zip(taught, module.parameters(), strict=True))


def test_the_matrix_of_network_and_controller_is_that_of_each_samples_own_feedback():
    """∂/∂(v, u) of the dynamics, Eqs. (1) and (4), with K u at each layer, a sample at a time."""
    module, x, y = made("mlp")
    net = ControlledNetwork(module, seed=0)
    taught(net, FeedbackAlignment(), x, y)
    forward = net.bound(net.observe(x))
    k = jacobians(net, x, [b.detach() for b in net.feedback])
    layers, sizes, tau, alpha = (module[0], module[2], module[4]), [7, 5, 3], 0.2, 0.4

    def moved(state: Tensor, sample: int) -> Tensor:
        *v, u = state.split([*sizes, 3])
        heard = [x[sample], torch.tanh(v[0]), F.softplus(v[1])]
        drives = (u @ k[sample]).split(sizes)
        change = [(-a + layer(r) + d) / tau for a, layer, r, d in zip(v, layers, heard, drives)]
        return torch.cat([*change, -v[-1] - alpha * u])  # the target is a constant

    found = control_matrix(forward, PIController(alpha), tau)
    for b in range(len(x)):
        at = torch.cat([*(v[b] for v in forward.v), torch.zeros(3, dtype=x.dtype)])
        assert close(found[b], torch.func.jacrev(lambda state, b=b: moved(state, b))(at), 1e-10)
