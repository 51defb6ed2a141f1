"""What ``loss.backward()`` leaves in ``.grad``, against torch autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases.architectures import ARCHITECTURES, Chained, batch, by_autograd, flat, made, taught
from cases.chains import close, degrees
from torch import Tensor, nn

from dfc_lightning import DFA, DFC, Backprop, ControlError, ControlledNetwork, MinimumNorm, PIController
from dfc_lightning.settling import Euler, Linearized, SteadyState

EXACT = PIController(alpha=0.0)
SETTLINGS = {"steady_state": SteadyState(), "linearized": Linearized()}


def grads(module: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in module.parameters()]


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
        (x, _), module = batch(), made("functional tanh")
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


@pytest.mark.parametrize("overflow", [False, True])
def test_torchs_grad_scaler_steps_as_if_it_were_not_there_and_skips_an_overflow(overflow):
    (x, y), plain, scaled = batch(), made("functional tanh"), made("functional tanh")
    torch.optim.SGD(taught(plain, DFC(), x, y).parameters(), 0.1).step()
    optimizer, scaler = torch.optim.SGD(scaled.parameters(), 0.1), torch.amp.GradScaler("cpu")
    net = ControlledNetwork(scaled)
    with net.taught_by(DFC()) as lesson:
        loss = F.cross_entropy(net(x), y) * (torch.inf if overflow else 1.0)
    lesson.watch(loss)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    end, start = torch.cat([p.detach().flatten() for p in scaled.parameters()]), made("functional tanh")
    expected = torch.cat([p.detach().flatten() for p in (start if overflow else plain).parameters()])
    assert torch.equal(end, expected) if overflow else close(end, expected, 1e-12)
    assert scaler.get_scale() == 65536 * (0.5 if overflow else 1)


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


def test_the_output_keeps_its_value():
    module, (x, _) = made("functional tanh"), batch()
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


@pytest.mark.parametrize("change", ["input", "weight"])
def test_changes_in_place_before_backward_are_refused_as_by_autograd(change):
    module, (x, y) = made("functional tanh"), batch()
    net = ControlledNetwork(module)
    with net.taught_by(DFC()):
        loss = F.cross_entropy(net(x), y)
    with torch.no_grad():
        (x if change == "input" else module.last.weight).zero_()
    with pytest.raises(ControlError, match="modified in place.*after backward"):
        loss.backward()


def test_the_loss_may_work_on_the_output_in_place():
    def loss(output: Tensor, y: Tensor) -> Tensor:
        output[:, 0] = 0
        return F.cross_entropy(output.div_(2), y)

    module, (x, y) = made("functional tanh"), batch()
    assert close(flat(taught(module, Backprop(), x, y, loss)), flat(by_autograd(module, x, y, loss)), 1e-12)


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
