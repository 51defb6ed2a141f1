"""The closed forms of a chain are what torch.func and autograd say of its forward pass."""

from __future__ import annotations

import pytest
import torch
from cases.chains import NETWORKS, PHI, Case, close, flat, make
from torch import Tensor

from dfc_lightning.rules import DFC, Backprop
from dfc_lightning.settling import Euler, Linearized, SteadyState
from dfc_lightning.settling.controller import PIController

TIGHT = 1e-10
networks = pytest.mark.parametrize("name", NETWORKS)


def output_gain_at_mean_slopes(case: Case) -> Tensor:
    """JQ with the batch mean of the slopes, by multiplying out."""
    forward = case.forward
    product = torch.diag(forward.slopes[-1].mean(0))
    total = product @ case.feedback[-1]
    for w, q, d in list(zip(forward.weights[1:], case.feedback, forward.slopes))[::-1]:
        product = product @ w * d.mean(0)
        total = total + product @ q
    return total


def drive(case: Case, size: float) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return size * torch.randn(case.loss_grad.shape, generator=g, dtype=case.x.dtype)


@networks
@pytest.mark.parametrize("batch", [1, 5])
def test_jacobians_and_output_gain_equal_the_dense_ones(name: str, batch: int) -> None:
    case = make(name, "unruly", batch)
    assert close(torch.cat(case.forward.jacobians(), dim=2), case.jacobian, TIGHT)
    assert close(case.forward.gain(), case.gain, TIGHT)
    assert close(case.forward.mean_gain()[0], output_gain_at_mean_slopes(case), TIGHT)


@networks
def test_linear_response_and_errors_are_products_with_the_dense_jacobian(name: str) -> None:
    case = make(name, "unruly")
    u = drive(case, 1.0)
    response = case.forward.linear_response(case.forward.apical(u))
    assert close(response, torch.einsum("boc,bc->bo", case.gain, u), TIGHT)
    errors = torch.cat(case.forward.pull(u), dim=1)
    assert close(errors, torch.einsum("bov,bo->bv", case.jacobian, u), TIGHT)


@networks
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_the_response_is_a_second_forward_pass_with_the_feedback_added(name: str, size: float) -> None:
    case = make(name, "unruly")
    u = drive(case, size)
    pushes = [u @ q.T for q in case.forward.feedback]
    response = case.forward.respond(case.forward.apical(u))
    before, after = case.rates(), case.rates(pushes)
    for mine, r, driven, was in zip(response.rates, after, response.driven, before):
        assert torch.allclose(mine, r - was, rtol=0, atol=1e-12 * max(1.0, size))
        assert driven.shape == r.shape
    for i, w in enumerate(case.forward.weights[1:], start=1):
        assert torch.allclose(response.basal[i], (after[i - 1] - before[i - 1]) @ w.T, atol=1e-12 * max(1.0, size))
        assert torch.equal(response.driven[i], case.forward.apical(u)[i])


@networks
def test_backprop_equals_autograd_of_the_mean_loss(name: str) -> None:
    case = make(name)
    leaves = [[t.clone().requires_grad_() for t in layers] for layers in (case.forward.weights, case.forward.biases)]
    loss = case.losses(case.output(parameters=leaves)).mean()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*leaves[0], *leaves[1]])])
    assert close(flat(Backprop().teach(case.forward, case.loss_grad)), gradient, TIGHT)


VOLTAGES = torch.tensor([0.0, 1e-9, 1e-5, 1e-3, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 25.0, 40.0], dtype=torch.float64)
VOLTAGES = torch.cat([-VOLTAGES.flip(0), VOLTAGES])
CHANGES = torch.tensor([1e-12, 1e-8, 1e-5, 1e-4, 1e-2, 0.3, 0.999, 1.0, 1.001, 3.0, 12.0, 50.0], dtype=torch.float64)
CHANGES = torch.cat([-CHANGES.flip(0), torch.zeros(1, dtype=torch.float64), CHANGES])
nonlinearities = pytest.mark.parametrize("kind", PHI)


@nonlinearities
def test_slopes_equal_autograd(kind: str) -> None:
    phi, function = PHI[kind]
    v = VOLTAGES.clone().requires_grad_()
    slope = torch.autograd.grad(function(v).sum(), v)[0]
    assert torch.equal(phi(VOLTAGES), function(VOLTAGES))
    assert torch.allclose(phi.slope(VOLTAGES, phi(VOLTAGES)), slope, rtol=1e-12, atol=1e-15)


@nonlinearities
def test_differences_equal_plain_differences_saturated_and_across_kinks(kind: str) -> None:
    phi, function = PHI[kind]
    v, d = (t.contiguous() for t in torch.meshgrid(VOLTAGES, CHANGES, indexing="ij"))
    plain = function(v + d) - function(v)
    found = phi.difference(v, phi(v), d)
    assert torch.allclose(found, plain, rtol=0, atol=2e-14), float((found - plain).abs().max())
    assert not found[d == 0].any()


@nonlinearities
@pytest.mark.parametrize("change", [1e-4, 1e-5, 1e-6])
def test_small_differences_keep_their_digits_in_float32(kind: str, change: float) -> None:
    phi, function = PHI[kind]
    g = torch.Generator().manual_seed(0)
    v = torch.linspace(-8, 8, 4001)
    v = torch.cat([v, change * torch.randn(500, generator=g)])  # the latter on both sides of a kink
    d = change * torch.randn(v.shape, generator=g)
    exact = function(v.double() + d.double()) - function(v.double())
    error = (phi.difference(v, phi(v), d).double() - exact).abs()
    plain = (function(v + d) - function(v)).double().sub(exact).abs()
    middle = v.abs() < 2
    assert (error <= 1e-6 * d.double().abs() + 1e-16).all()  # saturated units: against the change of voltage
    assert (error[middle] <= 1e-5 * exact[middle].abs() + 1e-16).all()  # others: against their own change
    if kind != "linear":
        assert plain[middle].max() > 20 * error[middle].max()  # what subtracting two float32 rates would give


@pytest.mark.slow
@networks
@pytest.mark.parametrize("settling", [Linearized(), SteadyState(), Euler(steps=300)], ids=["SSA", "SS", "euler"])
@pytest.mark.parametrize("plasticity", ["rate_difference", "voltage_difference", "derivative"])
def test_float32_updates_agree_with_float64(name: str, settling, plasticity: str) -> None:
    case = make(name, "random")
    rule = DFC(settling, PIController(1e-3, 2.0), target_stepsize=1e-3, plasticity=plasticity)
    exact = rule.teach(case.forward, case.loss_grad)
    small = case.to(torch.float32)
    update = rule.teach(small.forward, small.loss_grad)
    alone = [case.only(slice(b, b + 1)) for b in range(len(case.x))]  # samples may cancel each other in the mean
    each = [rule.teach(one.forward, one.loss_grad) for one in alone]
    for kind in ("weights", "biases"):
        for layer, (mine, theirs) in enumerate(zip(getattr(update, kind), getattr(exact, kind))):
            assert mine.dtype == torch.float32
            size = torch.stack([getattr(one, kind)[layer].norm() for one in each]).mean()
            assert (mine.double() - theirs).norm() <= 1e-4 * size
