"""Networks of any architecture under control: against dense Jacobians, and against the module itself."""

from __future__ import annotations

import copy
import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from cases.chains import NETWORKS as CHAINS
from cases.chains import close, degrees, make
from cases.graphs import NETWORKS, GraphCase, Mixed, Residual
from torch import Tensor, nn

from dfc_lightning import (
    DFA,
    DFC,
    Backprop,
    ControlError,
    ControlledNetwork,
    Expected,
    MinimumNorm,
    PIController,
    Sampled,
)
from dfc_lightning.settling import Euler, Linearized, SteadyState, Trajectory

TIGHT = 1e-9
ALL = pytest.mark.parametrize("name", NETWORKS)


def taught(case: GraphCase, rule: object) -> tuple[dict[str, Tensor], object]:
    case.module.zero_grad()
    with case.network.taught_by(rule) as lesson:
        loss = F.cross_entropy(case.network(case.x), case.y)
    loss.backward()
    return {n: p.grad.clone() for n, p in case.module.named_parameters()}, lesson


def pushes(case: GraphCase, size: float = 1.0) -> list[Tensor]:
    torch.manual_seed(1)
    return [size * torch.randn(len(case.x), n, dtype=torch.float64) for n in case.forward.widths]


@ALL
@pytest.mark.parametrize("size", [1e-6, 1.0, 30.0])
@pytest.mark.parametrize("feedback", ["dense", "channel"])
def test_the_response_is_the_difference_of_two_runs(name, size, feedback):
    case = GraphCase(name, conv_feedback=feedback)
    apical = pushes(case, size)
    driven = case.forward.spread(apical)
    response = case.forward.respond(driven)
    (output, voltages), (before, still) = case.run(driven), case.run([None] * len(driven))
    assert close(response.output, output - before, TIGHT + 1e-14 / size)
    for v, v_still, basal, apical_voltage in zip(voltages, still, response.basal, driven):
        assert (basal + apical_voltage - (v - v_still)).norm() <= TIGHT * (v - v_still).norm() + 1e-12


@ALL
def test_jacobian_products_are_those_of_the_dense_jacobian(name):
    case = GraphCase(name)
    dense, found = case.jacobians(), case.forward.jacobians()
    assert all(j.shape == d.shape and (j - d).norm() <= TIGHT * d.norm() for j, d in zip(found, dense))
    gain = sum(j @ q for j, q in zip(dense, case.forward.feedback))
    assert close(case.forward.gain(), gain, TIGHT)
    assert close(case.forward.mean_gain()[0], gain.mean(0), TIGHT)
    apical, error = pushes(case), torch.randn(len(case.x), 3, dtype=torch.float64)
    linear = sum((j @ a.unsqueeze(2)).squeeze(2) for j, a in zip(dense, apical))
    assert close(case.forward.linear_response(case.forward.spread(apical)), linear, TIGHT)
    for pulled, j in zip(case.forward.gathered(case.forward.pull(error)), dense):
        assert close(pulled, (j.mT @ error.unsqueeze(2)).squeeze(2), TIGHT)


@ALL
def test_feedback_by_channel_is_dense_feedback_alike_at_all_positions(name):
    dense, shared = GraphCase(name, conv_feedback="dense"), GraphCase(name, conv_feedback="channel")
    for j, full, port, shape in zip(
        shared.forward.jacobians(),
        dense.forward.jacobians(),
        shared.forward.ports,
        [v.shape[1:] for v in shared.forward.v],
    ):
        over = [k + 2 for k, (one, n) in enumerate(zip(port, shape)) if one == 1 and n > 1]
        summed = full.unflatten(2, shape).sum(over) if over else full
        assert close(j.flatten(1), summed.flatten(1), TIGHT)


@ALL
@pytest.mark.parametrize("stepsize", [1e-3, 0.3])
def test_the_steady_state_is_one_of_the_module_itself(name, stepsize):
    case = GraphCase(name, feedback_init="jacobian")
    _, lesson = taught(case, DFC(settling=SteadyState(rtol=1e-11), target_stepsize=stepsize))
    assert lesson.settled.converged.all()
    u, offset = lesson.settled.control, -stepsize * case.loss_grad
    output, _ = case.run(case.forward.apical(u))
    leakage = PIController().steady_leakage
    missing = offset - (output - case.forward.output) - leakage * u
    assert missing.norm() <= 1e-10 * offset.norm() + 1e-13


@ALL
def test_lemma_1_from_the_dense_jacobian(name):
    case = GraphCase(name, feedback_init="jacobian")
    alpha = 0.05
    _, lesson = taught(case, DFC(settling=Linearized(), controller=PIController(alpha=alpha), target_stepsize=1e-3))
    gain = sum(j @ q for j, q in zip(case.jacobians(), case.forward.feedback))
    u = torch.linalg.solve(gain + alpha * torch.eye(3, dtype=torch.float64), -1e-3 * case.loss_grad)
    assert close(lesson.settled.control, u, 1e-8)


def relu_of(v: Tensor) -> Tensor:
    return F.relu(v)


def test_the_update_of_a_convolution_is_eq_5_summed_over_positions():
    case = GraphCase("plain")
    stepsize, module = 0.4, case.held
    found, lesson = taught(case, DFC(settling=SteadyState(rtol=1e-11), target_stepsize=stepsize))
    q = case.forward.apical(lesson.settled.control)
    v = case.settled_voltages(q)
    heard = [case.x, F.max_pool2d(relu_of(v[0]), 3, 1, 1), relu_of(v[1]).flatten(1), torch.tanh(v[2])]
    rates = [relu_of, relu_of, torch.tanh, lambda v: v]
    for i, layer in enumerate((module.c1, module.c2, module.fc1, module.fc2)):
        t = rates[i](v[i]) - rates[i](v[i] - q[i])
        if i == 0:  # of the units in a window only the largest has a rate, once for each window
            before = relu_of(module.c1(case.x)).detach().requires_grad_()
            t = t * torch.autograd.grad(F.max_pool2d(before, 3, 1, 1).sum(), before)[0]
        product = (layer(heard[i]) * t).sum()  # its derivative in W is Σ t r
        expected = torch.autograd.grad(product, [layer.weight, layer.bias])
        name = ("c1", "c2", "fc1", "fc2")[i]
        for kind, value in zip(("weight", "bias"), expected):
            assert close(found[f"{name}.{kind}"], -value / (stepsize * len(case.x)), 1e-8)


def test_where_a_branch_is_added_the_nonlinearity_is_the_one_after_the_sum():
    case = GraphCase("residual", feedback_init="jacobian")
    found, lesson = taught(case, DFC(settling=SteadyState(rtol=1e-11), target_stepsize=0.2))
    q = case.forward.apical(lesson.settled.control)
    v = case.settled_voltages(q)
    m, names = case.held, [p.name for p in case.network.points]
    h = torch.tanh(v[0])
    z = v[1] + h  # the sum that the SiLU is of
    t = F.silu(z) - F.silu(z - q[1])
    rates = F.silu(z)
    fresh = copy.deepcopy(case.module)
    c2 = fresh.c2(torch.tanh(fresh.b1(fresh.c1(case.x)))).detach().requires_grad_()
    through = torch.autograd.grad(F.batch_norm(c2, None, None, fresh.b2.weight, fresh.b2.bias, True), c2, t)[0]
    expected = torch.autograd.grad((m.c2(h) * through).sum(), m.c2.weight)[0]
    scale = -1 / (0.2 * len(case.x))
    assert names[:2] == ["c1", "c2"]
    assert close(found["c2.weight"], scale * expected, 1e-8)
    # Both branches of the second block drive the same ReLU.
    last = {n: k for k, n in enumerate(names)}
    total = v[last["c4"]] + v[last["c3"]]
    signal = F.relu(total) - F.relu(total - q[last["c4"]])
    expected = torch.autograd.grad((m.c4(rates) * signal).sum(), m.c4.weight)[0]
    assert close(found["c4.weight"], scale * expected, 1e-8)


@ALL
def test_backprop_by_the_same_way_is_autograd_s(name):
    case = GraphCase(name)
    found, _ = taught(case, Backprop())
    case.module.zero_grad()
    F.cross_entropy(case.module(case.x), case.y).backward()
    for key, parameter in case.module.named_parameters():
        assert (found[key] - parameter.grad).norm() <= TIGHT * parameter.grad.norm() + 1e-14


@pytest.mark.parametrize("name", [n for n in CHAINS if n != "one_layer"])
@pytest.mark.parametrize(
    "rule",
    [
        DFC(),
        DFC(settling=Linearized()),
        DFC(settling=Euler(steps=30, dt=0.05), controller=PIController(0.1, 1.0), integrate=True),
        DFC(settling=Euler(steps=30, dt=0.05, apical_tau=0.3, instant_transmission=False, proactive=False)),
        DFC(settling=Euler(steps=30, dt=0.05, instant_transmission=False), integrate=True),
        DFC(settling=Euler(steps=9, dt=0.05, instant_system=True), integrate=True, plasticity="voltage_difference"),
        MinimumNorm(),
        DFA(),
        Backprop(),
    ],
    ids=lambda rule: type(getattr(rule, "settling", rule)).__name__,
)
def test_a_chain_as_a_graph_learns_the_same(name, rule):
    case = make(name, "random")
    sizes, hidden, _ = CHAINS[name]
    phi = {"linear": nn.Identity, "tanh": nn.Tanh, "relu": nn.ReLU, "sigmoid": nn.Sigmoid, "softplus": nn.Softplus}
    phi["leaky_relu"] = lambda: nn.LeakyReLU(0.1)
    layers: list[nn.Module] = []
    for w, b in zip(case.forward.weights, case.forward.biases):
        layers += [nn.Linear(w.shape[1], w.shape[0]).double(), phi[hidden]()]
        layers[-2].weight.data, layers[-2].bias.data = w.clone(), b.clone()
    module = nn.Sequential(*layers[:-1])
    updates = []
    for general in (False, True):
        net = ControlledNetwork(module, general=general)
        net.observe(case.x)
        net.load_state_dict(dict(zip([p.name for p in net.points], case.feedback)))
        assert net.observe(case.x).dense != general
        module.zero_grad()
        with net.taught_by(rule, "sum"):
            loss = case.losses(net(case.x)).sum()
        loss.backward()
        updates.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
    assert close(updates[1], updates[0], 1e-10)


@pytest.mark.slow
@ALL
@pytest.mark.parametrize("instant", [True, False])
def test_simulated_long_enough_it_comes_to_the_steady_state(name, instant):
    case = GraphCase(name, feedback_init="jacobian")
    euler = Euler(steps=3000, dt=0.05, tau_ratio=0.1, instant_transmission=instant, stop_below=1e-9)
    (slow, simulated), (solved, lesson) = (
        taught(case, DFC(settling=method, target_stepsize=0.05)) for method in (euler, SteadyState(rtol=1e-11))
    )
    assert simulated.settled.iterations < 3000
    assert close(simulated.settled.control, lesson.settled.control, 1e-6)
    for key, value in solved.items():
        assert (slow[key] - value).norm() <= 1e-5 * value.norm() + 1e-9


def test_the_closed_form_of_time_is_for_chains():
    with pytest.raises(ControlError, match=r"Trajectory.*Euler"):
        taught(GraphCase("plain"), DFC(settling=Trajectory(), integrate=True))


@ALL
def test_float32_keeps_the_digits_of_a_small_control(name):
    case = GraphCase(name, feedback_init="jacobian")
    exact, _ = taught(case, DFC(target_stepsize=1e-4))
    state = case.network.state_dict()
    single = ControlledNetwork(case.module.float())
    single.observe(case.x.float())
    single.load_state_dict(state)
    case.module.zero_grad()
    with single.taught_by(DFC(settling=SteadyState(rtol=1e-6), target_stepsize=1e-4)):
        loss = F.cross_entropy(single(case.x.float()), case.y)
    loss.backward()
    found = torch.cat([p.grad.double().flatten() for p in case.module.parameters()])
    assert close(found, torch.cat([g.flatten() for g in exact.values()]), 1e-4)


@ALL
def test_it_is_not_backprop_in_disguise(name):
    case = GraphCase(name, feedback_init="normal")
    back, _ = taught(case, Backprop())
    ours, _ = taught(case, DFC(settling=Linearized()))
    first = next(iter(back))
    assert degrees(ours[first], back[first]) > 20
    with torch.no_grad():
        torch.manual_seed(5)
        for q in case.network.feedback[:-1]:
            q.copy_(0.1 * torch.randn_like(q))
    turned, _ = taught(case, DFC(settling=Linearized()))
    assert degrees(ours[first], turned[first]) > 20  # what a layer learns hangs on the feedback weights


@ALL
def test_without_an_error_nothing_is_learned(name):
    case = GraphCase(name)
    with case.network.taught_by(DFC()):
        loss = 0.0 * case.network(case.x).sum()
    loss.backward()
    assert all(not p.grad.any() for p in case.module.parameters())


def test_running_statistics_move_once_a_step():
    case = GraphCase("residual")
    twin = copy.deepcopy(case.module)
    taught(case, DFC())
    twin(case.x)
    for key, value in twin.state_dict().items():
        assert torch.equal(case.module.state_dict()[key], value)


def test_in_evaluation_the_running_statistics_are_used():
    case = GraphCase("residual")
    case.module.eval()
    forward = case.network.observe(case.x)
    assert close(forward.output, case.module(case.x).detach(), TIGHT)
    apical = case.forward.apical(torch.randn(4, 3, dtype=torch.float64))
    case.held = copy.deepcopy(case.module)
    output, _ = case.run(apical)
    assert close(forward.respond(apical).output, output - forward.output, TIGHT)


@pytest.mark.parametrize("dropout", [nn.Dropout(0.4), nn.Dropout(0.4, inplace=True)], ids=["", "in place"])
def test_dropped_units_stay_dropped_while_settling(dropout):
    """What comes out of a seeded forward pass tells the mask; the settled state has to be one with that mask."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 50), nn.Tanh(), dropout, nn.Linear(50, 3)).double()
    x, y = torch.randn(5, 6, dtype=torch.float64), torch.randint(3, (5,))
    masks: list[Tensor] = []
    ones = torch.ones(5, 50, dtype=torch.float64)
    dropout.register_forward_hook(lambda m, args, out: masks.append(out.detach().clone()))
    controlled = ControlledNetwork(net, feedback_init="xavier_normal", seed=0)
    with controlled.taught_by(DFC(settling=SteadyState(rtol=1e-11), target_stepsize=0.5)) as lesson:
        loss = F.cross_entropy(controlled(x), y)
    hidden = torch.tanh(net[0](x)).detach()
    mask = masks[0] / hidden
    assert len(masks) == 1 and set(mask.round(decimals=6).unique().tolist()) == {0.0, round(1 / 0.6, 6)}
    loss.backward()
    assert len(masks) == 1 and lesson.settled.converged.all()
    u, (q, q_last) = lesson.settled.control, [w.detach() for w in controlled.feedback]

    def missing(mask: Tensor) -> Tensor:
        """How far the control is from a steady state of the network with some units dropped."""
        plain, moved = (net[3](torch.tanh(net[0](x) + push) * mask).detach() for push in (0.0, u @ q.T))
        leaf = plain.clone().requires_grad_()
        grad = torch.autograd.grad(F.cross_entropy(leaf, y, reduction="sum"), leaf)[0]
        return -0.5 * grad - (moved + u @ q_last.T - plain) - PIController().steady_leakage * u

    assert missing(mask).norm() < 1e-9
    assert missing(mask.roll(1, 0)).norm() > 1e-2  # other masks have other steady states
    assert missing(ones).norm() > 1e-2


def test_inputs_of_another_shape_than_at_first_are_refused():
    net = ControlledNetwork(nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)))
    net.observe(torch.randn(2, 1, 6, 6))
    with pytest.raises(ControlError, match=r"inputs of the same shape"):
        net.observe(torch.randn(2, 1, 7, 7))


def test_feedback_comes_back_before_and_after_the_first_pass():
    source = GraphCase("residual", feedback_init="normal")
    for target in (GraphCase("residual", seed=1), None):
        net = target.network if target else ControlledNetwork(Residual().double())
        net.load_state_dict(source.network.state_dict())
        net.observe(source.x)
        assert [p.name for p in net.points] == [p.name for p in source.network.points]
        assert all(map(torch.equal, net.feedback, source.network.feedback))
    wrong = source.network.state_dict()
    for rows in (143, 140):  # no multiple of the channels; and one, whose positions a pass has to tell
        wrong["c1"] = wrong["c1"][:rows]
        net = ControlledNetwork(Residual().double())
        with pytest.raises(ControlError, match=r"'c1' has the shape"):
            net.load_state_dict(wrong)
            assert rows == 140
            net.observe(source.x)


@pytest.mark.parametrize("method", [Expected(steps=9), Sampled(steps=9)], ids=["expected", "sampled"])
@pytest.mark.parametrize("how", ["draw", "gradient"])
def test_feedback_learning_of_a_chain_as_a_graph_is_the_same(method, how):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3)).double()
    x, found, saved = torch.randn(5, 6, dtype=torch.float64), [], None
    for general in (False, True):
        net = ControlledNetwork(module, general=general, feedback_init="normal", seed=0)
        forward = net.observe(x)
        assert forward.dense != general
        if saved is not None:
            net.load_state_dict(saved)
        saved, noise = net.state_dict(), torch.Generator().manual_seed(1)

        def draw(shape: tuple[int, int], noise: torch.Generator = noise) -> Tensor:
            return torch.randn(shape, dtype=torch.float64, generator=noise)

        found.append(torch.cat(getattr(method, how)(net.bound(forward), draw)))
    assert close(found[1], found[0], 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "conv head"])
@pytest.mark.parametrize("feedback", ["dense", "channel"])
def test_expected_feedback_learning_is_the_mean_of_the_simulated(name, feedback):
    case = GraphCase(name, batch=2, feedback_init="normal", conv_feedback=feedback)
    phase = dict(steps=6, dt=0.05, tau_ratio=0.1, apical_tau=0.2, sigma=1e-4)
    expected = torch.cat(Expected(**phase).draw(case.forward, torch.randn))
    torch.manual_seed(0)
    draws = [
        torch.cat(Sampled(**phase).gradient(case.forward, lambda s: torch.randn(s, dtype=torch.float64)))
        for _ in range(300)
    ]
    mean, spread = torch.stack(draws).mean(0), torch.stack(draws).std(0).norm() / 300**0.5
    assert spread < 0.7 * expected.norm()
    assert (mean - expected).norm() < 1.3 * spread  # of some hundred entries, the mean misses by about one spread


def test_large_maps_get_feedback_by_channel():
    net = ControlledNetwork(nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 2, 3), nn.Flatten(), nn.Linear(288, 1200)))
    net.observe(torch.randn(1, 1, 16, 16))
    assert [q.shape[0] for q in net.feedback] == [8, 288, 1200]


@pytest.mark.parametrize("name", ["residual", "mixed"])
def test_points_are_counted_by_the_longest_way_to_the_output(name):
    case = GraphCase(name)
    ways = dict(zip([p.name for p in case.network.points], case.forward.somata))
    expected = {
        "residual": {"c1": 4, "c2": 3, "c3": 2, "c4": 2, "fc": 1},
        "mixed": {"c1": 4, "up": 3, "a": 2, "gate": 2, "b": 1, "side": 1},
    }
    assert ways == expected[name]


def test_torchvision_s_resnet18_is_taught_as_it_is():
    resnet = pytest.importorskip("torchvision").models.resnet18(num_classes=10)
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
    net = ControlledNetwork(resnet)
    with net.taught_by(DFC(settling=SteadyState(rtol=1e-4), target_stepsize=0.05)) as lesson:
        loss = F.cross_entropy(net(x), y)
    loss.backward()
    assert len(net.points) == 21 and lesson.settled.converged.all()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in resnet.parameters())
    assert sum(bool(p.grad.any()) for p in resnet.parameters()) == len(list(resnet.parameters()))
    assert math.isclose(loss.item(), math.log(10), rel_tol=0.5)


def test_nested_sequentials_are_taught():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)), nn.ReLU(), nn.Dropout2d(0.2))
    net = nn.Sequential(nn.Sequential(inner, nn.Sequential(nn.Flatten())), nn.Linear(48, 4))
    controlled = ControlledNetwork(net)
    with controlled.taught_by(DFC()) as lesson:
        loss = F.cross_entropy(controlled(torch.randn(6, 1, 6, 6)), torch.arange(6) % 4)
    loss.backward()
    assert [p.name for p in controlled.points] == ["0.0.0.0", "1"] and lesson.settled.converged.all()


def test_a_layer_norm_by_itself_is_a_point_of_its_own():
    case = GraphCase("pre-norm")
    assert [p.name for p in case.network.points] == ["inner", "norm", "outer", "head"]
    assert [p.norm for p in GraphCase("mixed").network.points][0].num_groups == 2
    assert isinstance(Mixed().n, nn.LayerNorm)


def test_nothing_of_a_pass_outlives_its_lesson():
    case = GraphCase("residual")
    gc.collect()
    gc.disable()  # no reference cycle may keep the tensors of a pass
    try:
        with case.network.taught_by(DFC()) as lesson:
            loss = F.cross_entropy(case.network(case.x), case.y)
        loss.backward()
        frames = [weakref.ref(lesson.forward.frame), weakref.ref(case.network.observe(case.x).frame)]
        del lesson, loss
        assert [frame() for frame in frames] == [None, None]
    finally:
        gc.enable()
