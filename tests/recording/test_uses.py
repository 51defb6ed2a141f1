"""A control point is a use of a parameter: wherever samples meet one, and as often as they do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from cases.uses import CASES, Case, Text
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.nn.utils import parametrizations, prune

from dfc_lightning import (
    DFA,
    DFC,
    Backprop,
    ControlError,
    ControlledNetwork,
    FeedbackAlignment,
    KolenPollack,
    LayeredDFC,
    MinimumNorm,
)
from dfc_lightning.rules.dfc import LearningRule

double = pytest.mark.usefixtures("in_double")


@pytest.fixture
def in_double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def taught(net: ControlledNetwork, rule: LearningRule, x: Tensor, y: Tensor) -> list[Tensor]:
    """What a rule teaches each parameter of a module."""
    net.module.zero_grad()
    with net.taught_by(rule):
        loss = F.cross_entropy(net(x), y)
    loss.backward()
    return [p.grad.clone() for p in net.module.parameters()]


def assert_close(found: list[Tensor], true: list[Tensor], rtol: float) -> None:
    for a, b in zip(found, true, strict=True):
        assert (a - b).norm() <= rtol * b.norm() + 1e-14


@double
@pytest.mark.parametrize("name", CASES)
def test_each_voltage_is_a_point(name):
    case = CASES[name]
    module, x = case.make(), case.x()
    net = ControlledNetwork(module)
    forward = net.observe(x)
    output = module(x)
    assert len({p.name for p in net.points}) == len(net.points) == len(module.seen)
    for v, seen in zip(forward.v, module.seen, strict=True):
        assert torch.allclose(v.flatten(), seen.flatten(), 1e-12, 1e-14)
    assert torch.allclose(forward.output.flatten(), output.flatten(), 1e-12)


@double
@pytest.mark.parametrize("name", CASES)
def test_the_minimum_norm_update_is_that_of_dense_jacobians(name):
    case, gamma = CASES[name], 0.3
    module, x, y = case.make(), case.x(), case.y()
    found = taught(ControlledNetwork(module), MinimumNorm(gamma, 0.1, "voltage_difference", False), x, y)
    module(x)
    still = [torch.zeros_like(v).split(len(v) // len(x)) for v in module.seen]  # a sample's rows each

    def output(sample: Tensor, *pushes: Tensor) -> Tensor:
        module.pushes = list(pushes)
        return module(sample.unsqueeze(0)).flatten()

    jacobians = []
    for sample, *own in zip(x, *still):
        found_each = jacobian(partial(output, sample), tuple(own))
        jacobians.append(torch.cat([j.flatten(1) for j in found_each], 1))
    module.pushes = []
    joint = torch.stack(jacobians)
    out = module(x).detach().requires_grad_()
    error = len(x) * torch.autograd.grad(F.cross_entropy(out, y), out)[0].view(len(x), -1)
    gram = joint @ joint.mT + gamma * torch.eye(joint.shape[1])
    signals = (joint.mT @ torch.linalg.solve(gram, error.unsqueeze(2))).squeeze(2)
    module.cutting = True
    module(x)
    module.zero_grad()
    parts = signals.split([s[0].numel() for s in still], 1)
    sum((t.reshape(v.shape) * v).sum() / len(x) for t, v in zip(parts, module.seen)).backward()
    assert_close(found, [p.grad for p in module.parameters()], 1e-9)


@double
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rule", [DFC(), LayeredDFC(), KolenPollack(), FeedbackAlignment(), DFA()], ids=repr)
def test_rules_with_feedback_teach_every_parameter(name, rule):
    case = CASES[name]
    module, x, y = case.make(), case.x(), case.y()
    net = ControlledNetwork(module, seed=1)
    found = taught(net, rule, x, y)
    assert all(g.isfinite().all() and g.any() for g in found)
    plain = taught(ControlledNetwork(module), Backprop(), x, y)
    a, b = (torch.cat([g.flatten() for g in each]) for each in (found, plain))
    assert F.cosine_similarity(a, b, dim=0) < 0.9999


def classifier(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), *between, nn.LazyLinear(3))


def sequences(make: Callable[[], nn.Module], output: Callable[[object], Tensor] = lambda found: found) -> nn.Module:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m, self.o = make(), nn.LazyLinear(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.o(output(self.m(x.view(-1, 3, 2))))

    return Whole()


class Crossing(nn.Module):
    """Attention of a learned query to what two layers make of the input; shares of the heads too."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.a, self.o = nn.MultiheadAttention(4, 2, batch_first=True, **options), nn.Linear(6, 3)
        self.q, self.k = nn.Parameter(torch.randn(1, 1, 4)), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        keys = self.k(x.view(-1, 3, 2))
        heard, shares = self.a(self.q.expand(len(x), -1, -1), keys, keys, key_padding_mask=x[:, ::2] > 1.5)
        return self.o(torch.cat([heard[:, 0], shares[:, 0, :2]], 1))


def last(found: tuple[Tensor, object]) -> Tensor:
    return found[0][:, -1]


def state(found: tuple[object, object]) -> Tensor:
    states = found[1]
    return (states[0] if isinstance(states, tuple) else states).transpose(0, 1).flatten(1)


def encoder(**options: object) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)
    return classifier(nn.Unflatten(1, (2, 4)), nn.Linear(4, 8), layer, nn.Flatten())


class InPlace(nn.Module):
    """Gains that overwrite what they scale, and go on with the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.gain = nn.Linear(6, 8), nn.Linear(8, 3), nn.Parameter(torch.rand(8) + 0.5)
        self.shift = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sin(self.a(x))
        h.mul_(self.gain)
        h += self.shift
        h.relu_()
        return self.b(h)


class Positions(nn.Module):
    """A bias of scores that a small network makes of a table with as many rows as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 4), nn.Linear(4, 3)
        self.makes = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 1, bias=False))
        self.register_buffer("table", torch.randn(4, 4, 2)[:, :3], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x.view(-1, 3, 2))
        scores = h @ h.transpose(1, 2) + self.makes(self.table).squeeze(2)[:3]
        return self.b((scores.softmax(2) @ h).mean(1))


class Folded(nn.Module):
    """Windows taken apart and put together, as outlooking attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        windows = F.unfold(self.a(x).view(-1, 1, 4, 4), 3, padding=1)
        return self.b(F.fold(torch.tanh(windows), 4, 3, padding=1).flatten(1))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "prelu": lambda: classifier(nn.PReLU()),
    "prelu of channels": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.PReLU(4), nn.Flatten(), nn.Linear(16, 3)
    ),
    "weight norm": lambda: classifier(nn.Tanh(), parametrizations.weight_norm(nn.Linear(8, 5)), nn.Tanh()),
    "spectral norm": lambda: classifier(nn.Tanh(), parametrizations.spectral_norm(nn.Linear(8, 5)), nn.Tanh()).eval(),
    "orthogonal": lambda: classifier(nn.Tanh(), parametrizations.orthogonal(nn.Linear(8, 5)), nn.Tanh()),
    "pruned": lambda: classifier(nn.Tanh(), prune.l1_unstructured(nn.Linear(8, 5), "weight", 0.5), nn.Tanh()),
    "pruned kernel": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 6)),
        prune.ln_structured(nn.Conv1d(1, 4, 3), "weight", 0.5, 2, 0),
        nn.Flatten(),
        nn.Linear(16, 3),
    ),
    **{
        f"{kind.__name__}{options}{output.__name__}": lambda kind=kind, options=options, output=output: sequences(
            lambda: kind(2, 4, batch_first=True, **options), output
        )
        for kind in (nn.LSTM, nn.GRU, nn.RNN)
        for options, output in (({}, last), ({"num_layers": 2}, state), ({"bidirectional": True}, last))
    },
    "time first": lambda: sequences(lambda: First(nn.LSTM(2, 4)), lambda found: found.flatten(1)),
    "projected": lambda: sequences(lambda: nn.LSTM(2, 4, proj_size=3, batch_first=True), last),
    "no bias": lambda: sequences(lambda: nn.GRU(2, 4, bias=False, batch_first=True), last),
    "gains in place": InPlace,
    "position biases": Positions,
    "folds": Folded,
    "crossing": Crossing,
    "crossing, other widths": lambda: Crossing(kdim=4, vdim=4, bias=False),
    "transformer": lambda: encoder(),
    "transformer, norm first": lambda: encoder(norm_first=True, dropout=0.2, activation="gelu"),
    "embedding bag": lambda: nn.Sequential(Signs(), nn.EmbeddingBag(8, 4), nn.Linear(4, 3)),
}


class First(nn.Module):
    """Time before the samples."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        return self.m(x.transpose(0, 1))[0].transpose(0, 1)


class Signs(nn.Module):
    """Numbers as words."""

    def forward(self, x: Tensor) -> Tensor:
        return (x > 0).long() + 2 * torch.arange(6, device=x.device).remainder(4)


@double
@pytest.mark.parametrize("name", MODULES)
def test_a_module_of_torch_is_taken_as_it_is(name):
    x, y, twins = torch.randn(4, 6), torch.arange(4) % 3, []
    for _ in range(2):  # a pruned module cannot be copied
        torch.manual_seed(0)
        twins.append(MODULES[name]())
        twins[-1](x)
    module, plain = twins
    net = ControlledNetwork(module)

    def loss(run: Callable[[Tensor], Tensor]) -> Tensor:
        torch.manual_seed(1)  # of dropout
        return F.cross_entropy(run(x), y)

    loss(plain).backward()
    with net.taught_by(Backprop()):
        found = loss(net)
    found.backward()
    assert_close([p.grad for p in module.parameters()], [p.grad for p in plain.parameters()], 1e-10)
    with net.taught_by(LayeredDFC()) as lesson:
        found = loss(net)
    found.backward()
    assert lesson.settled.converged.all()


IMAGES: dict[str, Callable[[], nn.Module]] = {
    "vision transformer": lambda: torchvision.models.VisionTransformer(16, 4, 2, 2, 8, 16, num_classes=3),
    "swin": lambda: torchvision.models.SwinTransformer(
        [4, 4], 8, [2], [2], [2, 2], stochastic_depth_prob=0.0, num_classes=3
    ),
    "convnext": lambda: torchvision.models.ConvNeXt(
        [torchvision.models.convnext.CNBlockConfig(8, 16, 1), torchvision.models.convnext.CNBlockConfig(16, None, 1)],
        num_classes=3,
    ),
}


@double
@pytest.mark.parametrize("name", IMAGES)
def test_a_network_of_torchvision_is_taken_as_it_is(name):
    module, x, y = IMAGES[name](), torch.randn(3, 3, 16, 16), torch.arange(3)
    for p in module.parameters():  # heads that start at zero send no error back
        nn.init.normal_(p, std=0.3)
    plain, net = copy.deepcopy(module), ControlledNetwork(module)
    F.cross_entropy(plain(x), y).backward()
    found = taught(net, Backprop(), x, y)
    assert_close(found, [p.grad for p in plain.parameters()], 1e-10)
    with net.taught_by(LayeredDFC()) as lesson:
        loss = F.cross_entropy(net(x), y)
    loss.backward()
    assert lesson.settled.converged.all()


@double
def test_names_tell_which_use_is_meant():
    names = {
        "Scaled": ["a", "gain", "act.weight", "b", "log_scale"],
        "Standardised": ["c", "d", "e"],
        "Recurrent": ["i", "h", "i#2", "h#2", "i#3", "h#3", "o"],
        "Siblings": ["a", "a#2", "b", "c", "o"],
        "Tokens": ["patch", "token", "place", "norm", "qkv", "out"],
        "Text": ["words.weight", "places.weight", "mix", "norm", "head"],
    }
    for name, expected in names.items():
        net = ControlledNetwork(CASES[name].make())
        net.observe(CASES[name].x())
        assert [p.name for p in net.points] == expected


@double
@pytest.mark.parametrize("kind", [DFC(), KolenPollack()], ids=["direct", "layered"])
@pytest.mark.parametrize("name", CASES)
def test_feedback_weights_are_saved_and_loaded(name, kind):
    case = CASES[name]
    module, x, y = case.make(), case.x(), case.y()
    one = ControlledNetwork(module, seed=1)
    found = taught(one, kind, x, y)
    other = ControlledNetwork(module, seed=2)
    other.load_state_dict(one.state_dict(), kind.feedback, one.outputs_at)
    again = taught(other, kind, x, y)
    for a, b in zip(found, again, strict=True):
        assert torch.equal(a, b)


@double
def test_a_pass_of_fewer_samples_is_the_same():
    for name, case in CASES.items():
        module, x = case.make(), case.x()
        net = ControlledNetwork(module)
        forward = net.observe(x)
        few = forward.samples(torch.tensor([0, 2]))
        driven = [torch.randn_like(v) * 0.1 for v in few.v]
        spread = [torch.zeros_like(v).index_copy(0, torch.tensor([0, 2]), d) for v, d in zip(forward.v, driven)]
        with torch.no_grad():
            a, b = few.respond(driven).output, forward.respond(spread).output[[0, 2]]
        assert torch.allclose(a, b, 1e-10, 1e-12), name


@double
def test_a_parameter_of_the_loss_is_refused():
    class Weighed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.log_variance = nn.Linear(6, 3), nn.Parameter(torch.zeros(()))

    module = Weighed()
    net = ControlledNetwork(module)
    with pytest.raises(ControlError, match=r"log_variance.*Freeze.*network="), net.taught_by(DFC()):
        module.net(torch.randn(4, 6))


@double
def test_tied_weights_learn_from_both_of_their_uses():
    module, x, y = Case(Text).make(), CASES["Text"].x(), CASES["Text"].y()
    apart = copy.deepcopy(module)
    apart.head.weight = nn.Parameter(apart.words.weight.detach().clone())
    F.cross_entropy(apart(x), y).backward()
    net = ControlledNetwork(module)
    with net.taught_by(Backprop()):
        loss = F.cross_entropy(net(x), y)
    loss.backward()
    first, second = apart.words.weight.grad, apart.head.weight.grad
    assert min(first.norm(), second.norm()) > 0.01 * (first + second).norm()
    torch.testing.assert_close(module.words.weight.grad, first + second, rtol=1e-10, atol=1e-12)
    uses = [p for p in net.points if any(q is module.head.weight for q in p.parameters)]
    assert len(uses) == 2 and module.words.weight is module.head.weight
