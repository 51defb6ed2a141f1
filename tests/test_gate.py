"""What ``loss.backward()`` leaves in ``.grad``, against torch autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cases import close, degrees
from dfc_lightning import DFA, DFC, Backprop, ControlError, ControlledNetwork, MinimumNorm, PIController
from dfc_lightning.settling import Euler, Linearized, SteadyState

EXACT = PIController(alpha=0.0)
SETTLINGS = {"steady_state": SteadyState(), "linearized": Linearized()}


class Functional(nn.Module):
    """Layers registered in another order than called, nonlinearities as functions."""

    def __init__(self, phi: Callable[[Tensor], Tensor], bias: bool = True) -> None:
        super().__init__()
        self.phi = phi
        self.last = nn.Linear(4, 3, bias=bias)
        self.first = nn.Linear(6, 5, bias=bias)
        self.middle = nn.Linear(5, 4, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.phi(self.middle(self.phi(self.first(x)))))


class Chained(nn.Sequential):
    """Linear layers with a module between each two."""

    def __init__(self, phi: Callable[[], nn.Module], *last: nn.Module) -> None:
        super().__init__(nn.Linear(6, 5), phi(), nn.Linear(5, 4), phi(), nn.Linear(4, 3), *last)


class ByName(Chained):
    """Passes the input of its layers by name."""

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = module(input=x)
        return x


def frozen(index: int) -> nn.Module:
    net = Chained(nn.Tanh)
    net[index].requires_grad_(False)
    return net


def frozen_bias() -> nn.Module:
    net = Chained(nn.Tanh)
    net[2].bias.requires_grad_(False)
    return net


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "one layer": lambda: nn.Linear(6, 3),
    "nested": lambda: nn.Sequential(
        nn.Flatten(), nn.Sequential(nn.Linear(6, 5), nn.Tanh()), nn.Sequential(nn.Sequential(nn.Linear(5, 3)))
    ),
    "functional tanh": lambda: Functional(torch.tanh),
    "functional relu": lambda: Functional(F.relu),
    "method sigmoid": lambda: Functional(lambda v: v.sigmoid()),
    "x sigmoid(x)": lambda: Functional(lambda v: v * torch.sigmoid(v)),
    "where": lambda: Functional(lambda v: torch.where(v > 0, v, 0.1 * v)),
    "shifted": lambda: Functional(lambda v: 2 - torch.exp(-(v**2)) / 3),
    "leaky_relu with a slope": lambda: Functional(lambda v: F.leaky_relu(v, negative_slope=0.3)),
    "linear": lambda: Functional(lambda v: v),
    "no bias": lambda: Functional(torch.tanh, bias=False),
    "in-place method": lambda: Functional(lambda v: v.tanh_()),
    "in-place function": lambda: Functional(lambda v: F.relu(v, inplace=True)),
    "in-place relu": lambda: Chained(lambda: nn.ReLU(inplace=True)),
    "in-place leaky_relu": lambda: Chained(lambda: nn.LeakyReLU(0.2, inplace=True)),
    "in-place elu": lambda: Chained(lambda: nn.ELU(inplace=True)),
    "elu": lambda: Chained(nn.ELU),
    "gelu": lambda: Chained(nn.GELU),
    "silu": lambda: Chained(nn.SiLU),
    "softplus": lambda: Chained(nn.Softplus),
    "hardtanh": lambda: Chained(nn.Hardtanh),
    "softsign": lambda: Chained(nn.Softsign),
    "identity": lambda: Chained(nn.Identity),
    "two in a row": lambda: Chained(lambda: nn.Sequential(nn.Tanh(), nn.Softplus())),
    "by name": lambda: ByName(nn.Tanh),
    "log_softmax last": lambda: Chained(nn.Tanh, nn.LogSoftmax(1)),
    "softmax last": lambda: Chained(nn.Tanh, nn.Softmax(1)),
    "tanh last": lambda: Chained(nn.Tanh, nn.Tanh()),
    "frozen first layer": lambda: frozen(0),
    "frozen last layer": lambda: frozen(4),
    "frozen bias": frozen_bias,
}


def made(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return ARCHITECTURES[name]().to(dtype)


def batch(size: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(size, 6, generator=g).to(dtype), torch.randint(3, (size,), generator=g)


def grads(module: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in module.parameters()]


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def by_autograd(module: nn.Module, x: Tensor, y: Tensor, loss=F.cross_entropy) -> nn.Module:
    twin = copy.deepcopy(module)
    loss(twin(x), y).backward()
    return twin


def taught(module: nn.Module, rule, x: Tensor, y: Tensor, loss=F.cross_entropy, **options) -> nn.Module:
    module.zero_grad()
    net = ControlledNetwork(module, **options)
    with net.taught_by(rule):
        value = loss(net(x), y)
    value.backward()
    return module


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_backprop_as_a_rule_is_autograd(name):
    module, (x, y) = made(name), batch()
    for p, q in zip(grads(taught(module, Backprop(), x, y)), grads(by_autograd(module, x, y)), strict=True):
        assert (p is None) == (q is None)
        assert p is None or torch.allclose(p, q, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if "in-place" in n or "registered" in n])
def test_the_second_step_is_autograd_too(name):
    module, (x, y) = made(name), batch()
    net = ControlledNetwork(module)
    net.observe(x)
    with net.taught_by(Backprop()):
        loss = F.cross_entropy(net(x), y)
    loss.backward()
    assert close(flat(module), flat(by_autograd(module, x, y)), 1e-12)


@pytest.mark.parametrize("settling", SETTLINGS)
@pytest.mark.parametrize("loss", [F.cross_entropy, lambda r, y: F.mse_loss(r, F.one_hot(y, 3).to(r.dtype))])
def test_one_layer_with_identity_feedback_is_backprop(settling, loss):
    module, (x, y) = made("one layer"), batch()
    taught(module, DFC(settling=SETTLINGS[settling], controller=EXACT), x, y, loss)
    assert torch.allclose(flat(module), flat(by_autograd(module, x, y, loss)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("rule", [DFC(), DFC(settling=Linearized()), DFA(), MinimumNorm()], ids=lambda r: str(r)[:22])
def test_a_deep_network_is_not_taught_by_backprop(rule):
    module, (x, y) = made("functional tanh"), batch()
    taught(module, rule, x, y, feedback_init="xavier_normal", seed=0)
    assert degrees(flat(module), flat(by_autograd(module, x, y))) > 5


RULES = [Backprop(), DFC(), DFC(settling=Euler(steps=20), integrate=True), MinimumNorm(), DFA()]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: str(r)[:28])
class TestBatches:
    def test_repeating_the_batch_changes_nothing(self, rule):
        (x, y), module = batch(), made("functional tanh")
        once = flat(taught(module, rule, x, y, seed=0))
        assert close(flat(taught(module, rule, x.repeat(2, 1), y.repeat(2), seed=0)), once, 1e-9)

    def test_two_accumulated_halves_are_the_whole(self, rule):
        (x, y), module = batch(), made("functional tanh")
        whole = flat(taught(module, rule, x, y, seed=0))
        module.zero_grad()
        net = ControlledNetwork(module, seed=0)
        for half in (slice(0, 4), slice(4, 8)):
            with net.taught_by(rule) as lesson:
                loss = F.cross_entropy(net(x[half]), y[half])
            lesson.watch(loss)
            (loss / 2).backward()
        assert close(flat(module), whole, 1e-9)

    def test_a_grad_scaler_is_invisible(self, rule):
        (x, y), module = batch(), made("functional tanh")
        plain = flat(taught(module, rule, x, y, seed=0))
        module.zero_grad()
        net = ControlledNetwork(module, seed=0)
        with net.taught_by(rule) as lesson:
            loss = F.cross_entropy(net(x), y)
        lesson.watch(loss)
        (65536 * loss).backward()
        assert close(flat(module) / 65536, plain, 1e-12)

    def test_a_sum_over_the_batch_is_batch_size_times_the_mean(self, rule):
        (x, y), module = batch(), made("functional tanh")
        mean = flat(taught(module, rule, x, y, seed=0))
        module.zero_grad()
        net = ControlledNetwork(module, seed=0)
        with net.taught_by(rule, loss_reduction="sum"):
            loss = F.cross_entropy(net(x), y, reduction="sum")
        loss.backward()
        assert close(flat(module), 8 * mean, 1e-9)

    @pytest.mark.parametrize("poison", [float("inf"), float("nan")])
    def test_an_overflow_reaches_every_grad_so_that_a_scaler_skips(self, rule, poison):
        (x, y), module = batch(), made("functional tanh")
        net = ControlledNetwork(module, seed=0)
        with net.taught_by(rule):
            output = net(x)
        upstream = torch.ones_like(output)
        upstream[0, 0] = poison
        output.backward(upstream)
        assert not any(p.grad.isfinite().any() for p in module.parameters())


def test_without_the_batch_mean_undone_the_target_would_depend_on_the_batch_size():
    # A guard for the tests above: a nonlinear settling does see the size of its target.
    (x, y), module = batch(), made("functional tanh")
    small, large = (flat(taught(module, DFC(target_stepsize=s, controller=EXACT), x, y)) for s in (0.1, 0.8))
    assert degrees(small, large) > 0.1


def test_clipping_bounds_the_norm():
    module = taught(made("functional tanh"), DFC(), *batch())
    before = flat(module).clone()
    assert float(nn.utils.clip_grad_norm_(module.parameters(), 1e-3)) == pytest.approx(float(before.norm()))
    assert close(flat(module), before * 1e-3 / before.norm(), 1e-3)


def test_penalties_on_weights_are_left_to_autograd():
    module, (x, y) = made("functional tanh"), batch()

    def penalised(output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(output, y) + sum(p.square().sum() for p in module.parameters())

    plain, weights = flat(taught(module, DFC(), x, y, seed=0)), torch.cat([p.flatten() for p in module.parameters()])
    assert close(flat(taught(module, DFC(), x, y, penalised, seed=0)), plain + 2 * weights.detach(), 1e-12)


def test_a_second_backward_accumulates():
    module, (x, y) = made("functional tanh"), batch()
    net = ControlledNetwork(module)
    with net.taught_by(DFC()):
        loss = F.cross_entropy(net(x), y)
    loss.backward(retain_graph=True)
    once = flat(module).clone()
    loss.backward()
    assert close(flat(module), 2 * once, 1e-12)


@pytest.mark.parametrize("rule", [DFA(), DFC(controller=PIController(alpha=1e3))], ids=["dfa", "dfc, stiff leak"])
def test_no_error_travels_through_forward_weights(rule):
    """With J out of play, W_1's update hears the output error through Q_1 alone, whatever W_2 and W_3 are."""
    (x, y), module = batch(), made("functional tanh")
    net = ControlledNetwork(module, feedback_init="xavier_normal", seed=0)
    net.observe(x)

    def first_update() -> Tensor:
        module.zero_grad()
        with net.taught_by(rule):
            output = net(x)
        output.backward(torch.ones_like(output) / len(x))
        return module.first.weight.grad.clone()

    before = first_update()
    with torch.no_grad():
        module.middle.weight.neg_()
        module.last.weight.mul_(-3)
    assert close(first_update(), before, 2e-2)
    assert degrees(flat(by_autograd(module, x, y)), flat(module)) > 10


def test_the_input_gets_no_gradient_and_the_output_keeps_its_value():
    module, (x, y) = made("functional tanh"), batch()
    net = ControlledNetwork(module)
    with net.taught_by(DFC()):
        output = net(x)
    assert torch.equal(output, module(x))


def test_an_input_that_wants_a_gradient_is_an_error():
    """Else an encoder before the controlled network would silently never learn."""
    module = nn.ModuleDict({"encoder": nn.Linear(6, 6), "head": Chained(nn.Tanh)})
    net = ControlledNetwork(module, network="head")
    with pytest.raises(ControlError, match=r"head\.0.*gradient"), net.taught_by(DFC()):
        module["head"](module["encoder"](torch.randn(4, 6)))
    with net.taught_by(DFC()):
        module["head"](module["encoder"](torch.randn(4, 6)).detach())


@pytest.mark.parametrize("moment", ["before", "after"])
def test_hooks_are_gone_when_the_users_code_raises(moment):
    module, (x, _) = made("functional tanh"), batch()
    net = ControlledNetwork(module)
    with pytest.raises(ZeroDivisionError), net.taught_by(DFC()):
        if moment == "after":
            net(x)
        1 / 0  # noqa: B018
    assert not any(m._forward_hooks for m in module.modules())
    output = module(x)
    assert output.grad_fn is not None and "Gate" not in type(output.grad_fn).__name__
    assert not torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize("name", ["functional tanh", "in-place relu", "gelu"])
def test_bfloat16_autocast_gives_finite_float32_grads_close_to_float32(name):
    module, (x, y) = made(name, torch.float32), batch(32, torch.float32)
    full = flat(taught(module, DFC(), x, y, seed=0)).clone()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = flat(taught(module, DFC(), x, y, seed=0))
    assert mixed.dtype == torch.float32 and mixed.isfinite().all()
    assert close(mixed, full, 0.05)


def test_bfloat16_weights_get_bfloat16_grads():
    module, (x, y) = made("functional tanh", torch.bfloat16), batch(32, torch.bfloat16)
    assert flat(taught(module, DFC(), x, y)).dtype == torch.bfloat16
    reference = flat(taught(made("functional tanh", torch.float32), DFC(), x.float(), y))
    assert close(flat(module).float(), reference, 0.1)
