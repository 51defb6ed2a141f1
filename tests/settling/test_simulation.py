"""What makes the simulation fast changes nothing of it: sums over time to rounding, and an early stop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases.chains import Case, close, flat, make
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dfc_lightning.rules import DFC
from dfc_lightning.settling import Euler
from dfc_lightning.settling.controller import PIController
from dfc_lightning.settling.time_sum import BLOCK, ProductSums

EPS = {torch.float32: 1e-6, torch.float64: 2e-15}
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])

# Sums over time


def series(kind: str, steps: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    """(steps, 4, width): slow exponentials, the same with kinks, or noise."""
    g = torch.Generator().manual_seed(seed)
    time = torch.arange(steps, dtype=torch.float64).view(-1, 1, 1)
    rates = 0.01 + 0.1 * torch.rand(4, width, generator=g, dtype=torch.float64)
    smooth = torch.randn(4, width, generator=g, dtype=torch.float64) * (1 - torch.exp(-rates * time))
    if kind == "kinks":
        smooth = (smooth - smooth[steps // 2]).relu()
    if kind == "noise":
        smooth = torch.randn(smooth.shape, generator=g, dtype=torch.float64)
    return smooth.to(dtype)


def total(lefts: list[Tensor], rights: list[Tensor]) -> list[Tensor]:
    sums = ProductSums([x[0] for x in lefts], [x[0] for x in rights])
    for t in range(len(lefts[0])):
        sums.add([x[t] for x in lefts], [x[t] for x in rights])
    return sums.totals()


@dtypes
@pytest.mark.parametrize("kind", ["smooth", "kinks", "noise"])
@pytest.mark.parametrize("steps", [1, BLOCK, 5 * BLOCK + 3])
def test_products_are_summed_over_time_to_rounding(kind: str, steps: int, dtype: torch.dtype) -> None:
    widths = [(90, 80), (70, 90), (90, 5)]  # the last too narrow for a change of basis
    lefts = [series(kind, steps, n, dtype, k) for k, (n, _) in enumerate(widths)]
    rights = [series(kind, steps, m, dtype, 10 + k) for k, (_, m) in enumerate(widths)]
    for found, a, b in zip(total(lefts, rights), lefts, rights):
        exact = torch.einsum("tbn,tbm->nm", a.double(), b.double())
        assert found.dtype == dtype
        scale = a.double().norm() * b.double().norm()  # what rounding is relative to
        assert (found.double() - exact).norm() <= EPS[dtype] * scale


class Outer(TorchDispatchMode):
    """Counts the rows of which outer products are summed."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.addmm_.default:
            self.rows += args[1].shape[1]
        return func(*args, **(kwargs or {}))


@dtypes
def test_slow_series_need_few_multiplications_and_noise_all_of_them(dtype: torch.dtype) -> None:
    made = {}
    for kind in ("smooth", "noise"):
        pair = [series(kind, 4 * BLOCK, 400, dtype, seed) for seed in (0, 1)]
        with Outer() as counter:
            total(pair[:1], pair[1:])
        made[kind] = counter.rows
    assert made["noise"] == 4 * BLOCK * 4
    assert made["smooth"] < 0.8 * made["noise"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sample_that_has_left_the_numbers_is_not_hidden(value: float) -> None:
    a, b = (series("smooth", BLOCK, 80, torch.float64, seed) for seed in (0, 1))
    a[3, 2, 7] = value
    (found,) = total([a], [b])
    rows = torch.arange(80) != 7
    assert not torch.isfinite(found[7]).any()
    assert torch.allclose(found[rows], torch.einsum("tbn,tbm->nm", a, b)[rows])


# The whole simulation


def plainly_integrated(case: Case, method: Euler, pi: PIController, offset: Tensor, plasticity: str) -> list[Tensor]:
    """The mean of each W_i's update over batch and time, with voltages as they are, step by step."""
    weights, biases, phi = case.layers
    rates = case.rates()
    voltages = [h @ w.T + b for h, w, b in zip([case.x, *rates], weights, biases)]
    apical = [torch.zeros_like(v) for v in voltages]
    target, u = rates[-1] + offset, torch.zeros_like(offset)
    u_int, sums = u, [torch.zeros_like(w) for w in weights]
    for _ in range(method.steps):
        error, before = target - rates[-1], u
        u_int = u_int + method.dt * (error - pi.alpha * (u_int if pi.leak == "integral" else u))
        u = u_int + pi.k_p * error
        earlier, signals = list(rates), []
        for i, (w, b, q) in enumerate(zip(weights, biases, case.feedback)):
            heard = (u if method.proactive else before) @ q.T
            apical[i] = apical[i] + (heard - apical[i]) * (method.dt / (method.apical_tau or method.dt))
            upstream = [case.x, *(rates if method.instant_transmission or method.instant_system else earlier)][i]
            basal = upstream @ w.T + b
            share = 1 if method.instant_system else method.dt / method.tau_ratio
            voltages[i] = voltages[i] + (basal + apical[i] - voltages[i]) * share
            rates[i] = phi[i](voltages[i])
            signals.append(voltages[i] - basal if plasticity == "voltage_difference" else rates[i] - phi[i](basal))
        sums = [s + t.T @ r for s, t, r in zip(sums, signals, [case.x, *rates])]
    return [s / (method.steps + 1) / len(case.x) for s in sums]


SETTINGS: dict[str, tuple[str, str, dict[str, Any], PIController, float]] = {
    "random feedback, clamped": ("tanh", "random", {}, PIController(0.1), 1.0),
    "relu, clamped": ("relu", "random", {}, PIController(0.1, 1.0), 1.0),
    "large steps": ("tanh", "weight_product", {"dt": 0.2}, PIController(0.1), 1.0),
    "slow apical": ("tanh", "weight_product", {"apical_tau": 0.3, "proactive": False}, PIController(0.1, 0.5), 0.1),
    "delayed": ("sigmoid", "weight_product", {"instant_transmission": False}, PIController(0.1, 1.0, "control"), 0.1),
    "delayed, linear": ("linear", "weight_product", {"instant_transmission": False}, PIController(0.1), 1.0),
    "instant": ("leaky_relu", "weight_product", {"instant_system": True}, PIController(0.1, 0.0, "control"), 1.0),
}


@dtypes
@pytest.mark.parametrize("plasticity", ["rate_difference", "voltage_difference"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_integrated_update_is_that_of_a_plain_simulation(setting: str, plasticity: Any, dtype: torch.dtype) -> None:
    hidden, feedback, options, controller, stepsize = SETTINGS[setting]
    case = make(((12, 90, 80, 70, 4), hidden, "squared"), feedback)
    offset, method = -stepsize * case.loss_grad, Euler(steps=61, **options)
    expected = plainly_integrated(case, method, controller, offset, plasticity)
    mine = case.to(dtype)
    common = (mine.forward, offset.to(dtype), controller, plasticity, False)
    found = [taught[0] for taught in method.settle_and_integrate(*common)[1]]
    assert all(w.dtype == dtype for w in found)
    for ours, theirs in zip(found, expected):
        assert close(ours.double(), theirs, 1e-10 if dtype == torch.float64 else 1e-4)


# Stopping early


@pytest.mark.slow
@pytest.mark.parametrize("plasticity", ["rate_difference", "derivative"])
@pytest.mark.parametrize("net", ["linear", "tanh", "tanh_ce", "leaky_relu", "sigmoid", "one_layer"])
def test_an_early_stop_saves_steps_and_costs_what_it_says(net: str, plasticity: Any) -> None:
    case = make(net)
    full = DFC(Euler(steps=2000), PIController(0.1), integrate=True, plasticity=plasticity)
    exact = flat(full.teach(case.forward, case.loss_grad))
    made = []
    for speed in (1e-2, 1e-4):
        rule = replace(full, settling=Euler(steps=2000, stop_below=speed))
        update = rule.teach(case.forward, case.loss_grad)
        assert update.settled is not None
        assert close(flat(update), exact, 10 * speed)
        made.append(update.settled.iterations)
    assert made[0] < made[1] < 2000


def test_no_sample_is_stopped_before_the_last_has_come_to_rest() -> None:
    case = make("tanh", batch=6)
    case = replace(case, y=case.output() + torch.logspace(-6, 1, 6, dtype=torch.float64).unsqueeze(1) * case.y)
    common = (PIController(0.1), 1.0)
    stopping = Euler(steps=5000, stop_below=1e-5)

    def made(part: Case) -> int:
        return stopping.settle(part.forward, -common[1] * part.loss_grad, common[0]).iterations

    assert made(case) == max(made(case.only(slice(i, i + 1))) for i in range(6))


def test_noise_keeps_the_network_moving_to_the_last_step() -> None:
    case = make("tanh")
    settled = Euler(steps=300, sigma=0.1, stop_below=1e-2).settle(case.forward, -case.loss_grad, PIController(0.1))
    assert settled.iterations == 300


def test_a_speed_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="stop_below=0.0 is not possible: give a relative change"):
        Euler(stop_below=0.0)
