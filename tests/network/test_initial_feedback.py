"""Initial feedback weights, and what becomes of saved ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from dfc_lightning import DFC, ControlError, ControlledNetwork
from dfc_lightning.network.initial_feedback import shrunk


class Three(nn.Module):
    """Layers of 6-5-4-3."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def seen(init: str, seed: int = 0) -> ControlledNetwork:
    torch.manual_seed(3)
    module = Three().double()
    net = ControlledNetwork(module, feedback_init=init, seed=seed)
    net.observe(torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4)))
    return net


INITS = ("weight_product", "xavier_normal", "orthogonal", "normal", "jacobian")


@pytest.mark.parametrize("init", INITS)
def test_feedback_weights_reach_from_the_output_to_every_layer(init):
    net, other = seen(init), seen(init, seed=1)
    assert [tuple(q.shape) for q in net.feedback] == [(5, 3), (4, 3), (3, 3)]
    assert all(map(torch.equal, net.feedback, seen(init).feedback))
    random = init not in ("weight_product", "jacobian")
    assert torch.equal(net.feedback[0], other.feedback[0]) != random
    if init != "jacobian":
        assert torch.equal(net.feedback[-1], torch.eye(3).double())


def test_weight_product_is_the_product_of_the_weights_behind():
    net = seen("weight_product")
    b, c = net.module.b.weight, net.module.c.weight
    assert torch.allclose(net.feedback[1], c.T) and torch.allclose(net.feedback[0], b.T @ c.T)


def test_orthogonal_feedback_has_orthonormal_columns():
    q = seen("orthogonal").feedback[0]
    assert torch.allclose(q.T @ q, torch.eye(3).double())


def test_jacobian_feedback_is_the_mean_ridge_pseudoinverse_of_the_first_batch():
    net = seen("jacobian")
    m, x = net.module, torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def output(push: Tensor, x: Tensor) -> Tensor:
        p, q, r = push.split([5, 4, 3])
        return m.c(torch.tanh(m.b(torch.tanh(m.a(x) + p)) + q)) + r

    jacobian = vmap(jacrev(output), (None, 0))(torch.zeros(12).double(), x)
    dense = [torch.linalg.solve(j @ j.T + 0.1 * torch.eye(3), j).T for j in jacobian.detach()]
    assert torch.allclose(torch.cat(list(net.feedback)), torch.stack(dense).mean(0), rtol=1e-10)
    assert torch.allclose(net.jacobian(x), jacobian, rtol=1e-10)
    before = [q.clone() for q in net.feedback]
    net.observe(-x)
    assert all(map(torch.equal, net.feedback, before))


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("observed", [False, True])
def test_saved_feedback_comes_back_whatever_the_receiver_started_from(init, observed):
    source = seen("normal")
    with torch.no_grad():
        source.feedback[-1].mul_(2)
    target = seen(init, seed=1)
    if not observed:
        target = ControlledNetwork(target.module, feedback_init=init, seed=1)
    target.load_state_dict(source.state_dict())
    target.observe(torch.randn(4, 6).double())
    assert [p.name for p in target.points] == ["a", "b", "c"]
    assert all(map(torch.equal, target.feedback, source.feedback))


def test_feedback_of_layers_registered_in_another_order_comes_back():
    def make() -> ControlledNetwork:
        return ControlledNetwork(BackToFront(), feedback_init="normal", seed=0)

    source, target, x = make(), make(), torch.randn(4, 6)
    source.observe(x)
    assert [p.name for p in source.points] == ["first", "last"]
    target.load_state_dict(source.state_dict())
    target.observe(x)
    assert all(map(torch.equal, target.feedback, source.feedback))


class BackToFront(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last, self.first = nn.Linear(5, 3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


MISMATCHES = {
    "other names": (lambda s: {"x": s["a"]}, r"\['x'\].*\['a', 'b', 'c'\]"),
    "one missing": (lambda s: {k: s[k] for k in ("a", "b")}, "Load them into the network"),
    "other width": (lambda s: s | {"b": s["b"][:2]}, r"'b' has the shape \(2, 3\).*\(4, 3\)"),
    "other output": (lambda s: {k: q[:, :2] for k, q in s.items()}, "outputs"),
    "uneven outputs": (lambda s: s | {"a": s["a"][:, :2]}, r"'[abc]' has the shape"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_feedback_of_another_network_is_refused_and_nothing_changed(name):
    change, message = MISMATCHES[name]
    net = seen("normal")
    before = net.state_dict()
    with pytest.raises(ControlError, match=message):
        net.load_state_dict(change(net.state_dict()))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize(("common", "factor"), [(0.0, 0.0), (1.0, 1.0), (100.0, 1.0)])
def test_a_mean_that_chance_explains_is_none(common, factor):
    g = torch.Generator().manual_seed(0)
    samples = torch.randn(16, 400, 3, generator=g, dtype=torch.float64)
    samples = samples - (common == 0) * samples.mean(0) * 0.01 + common
    mean = shrunk(samples.mean(0), samples.square().sum((1, 2)).mean(), 16)
    assert torch.allclose(mean, factor * samples.mean(0), atol=0.05)


def test_a_mean_half_explained_by_chance_is_taken_in_part():
    mean = torch.ones(4, 3).double()  # m² = 12; n² = (162 − 12) / (26 − 1) = 6: (12 / 6 − 1) / 3 of it is taken
    assert torch.allclose(shrunk(mean, torch.tensor(162.0).double(), 26), mean / 3)
    assert torch.equal(shrunk(mean, torch.tensor(12.0).double(), 26), mean)
    assert torch.equal(shrunk(mean, torch.tensor(12.0).double(), 1), mean)


class Bottleneck(nn.Sequential):
    """Expand, depthwise, project; no shortcut."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6()),
            *(nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), nn.BatchNorm2d(24), nn.ReLU6()),
            *(nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8)),
        )


def test_a_deep_net_without_shortcuts_settles_as_its_weights_move():
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()]
    blocks = [Bottleneck() for _ in range(12)]
    module = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    x, y, net = torch.randn(16, 3, 8, 8), torch.randint(10, (16,)), ControlledNetwork(module)
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        with net.taught_by(DFC()) as lesson:
            loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        assert lesson.settled.converged.all() and lesson.settled.iterations <= 6


@pytest.mark.parametrize("what", ["weights", "batch"])
def test_initial_feedback_weights_that_are_not_finite(what):
    module, x = Three(), torch.ones(4, 6)
    if what == "weights":
        nn.init.constant_(module.b.weight, 1e30)
        nn.init.constant_(module.c.weight, 1e30)
    else:
        x[0] = torch.nan
    init = "weight_product" if what == "weights" else "jacobian"
    with pytest.raises(ControlError, match=r"initial feedback weights of 'a' are not finite.*'xavier_normal'"):
        ControlledNetwork(module, feedback_init=init).observe(x)
