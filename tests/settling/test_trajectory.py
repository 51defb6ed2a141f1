"""The integrated update in closed form is that of the simulation, to the order that it claims."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases.chains import Case, close, flat, make
from cases.golden import CASES, golden
from torch import Tensor

from dfc_lightning.passes import Layers
from dfc_lightning.rules import DFC
from dfc_lightning.settling import Euler, Settled, Simulation, SteadyState, Trajectory
from dfc_lightning.settling.controller import PIController

NETS = {
    "one layer": ((6, 3), "tanh", "cross_entropy"),
    "two layers": ((6, 5, 3), "tanh", "squared"),
    "three layers": ((20, 16, 16, 10), "tanh", "cross_entropy"),
    "four layers": ((6, 7, 5, 4, 3), "sigmoid", "squared"),
    "leaky relu": ((6, 5, 4, 3), "leaky_relu", "squared"),
    "linear": ((6, 5, 4, 3), "linear", "squared"),
}
CONTROLLERS = [PIController(0.1, k_p, leak) for leak in ("integral", "control") for k_p in (0.0, 2.0)]
# A network without inertia, its loop closed within a step, stays stable under little proportional gain only.
gentle = [replace(pi, k_p=pi.k_p / 20) for pi in CONTROLLERS]
controllers = pytest.mark.parametrize("controller", CONTROLLERS, ids=lambda pi: f"{pi.leak}-{pi.k_p}")
STEPS: dict[str, dict[str, Any]] = {
    "not proactive": {"proactive": False},
    "delayed transmission": {"instant_transmission": False},
    "instant system": {"instant_system": True},
    "apical filter": {"apical_tau": 0.1},
    "all slow": {"apical_tau": 0.1, "proactive": False, "instant_transmission": False},
}
TIGHT = 1e-12


def integrated(
    case: Case, method: Simulation, controller: PIController, stepsize: float, plasticity: Any = "rate_difference"
) -> tuple[Settled, Tensor]:
    offset = -stepsize * case.loss_grad
    settled, products = method.settle_and_integrate(case.forward, offset, controller, plasticity, False)
    return settled, torch.cat([t.flatten() for part in products for t in part])


def errors(
    case: Case,
    controller: PIController,
    stepsizes: tuple[float, ...],
    exact: bool,
    plasticity: Any = "rate_difference",
    **step: Any,
) -> list[float]:
    """The relative error of the update at each target stepsize."""
    found = []
    for stepsize in stepsizes:
        method = Trajectory(**step, settled=not exact, rtol=TIGHT)
        closed = integrated(case, method, controller, stepsize, plasticity)[1]
        simulated = integrated(case, Euler(**step), controller, stepsize, plasticity)[1]
        found.append(float((closed - simulated).norm() / simulated.norm()))
    return found


def first_order(found: list[float], at_most: float = 1e-6) -> bool:
    """Whether errors at ten times smaller stepsizes are ten times smaller, and small."""
    return found[1] < at_most and (found[1] < 1e-10 or 7 < found[0] / found[1] < 14)


# λ → 0


@pytest.mark.parametrize("net", NETS)
@controllers
@pytest.mark.parametrize("steps", [8, 60])
def test_not_taken_as_settled_it_is_the_simulation_to_first_order_after_any_number_of_steps(
    net: str, controller: PIController, steps: int
) -> None:
    step = {"steps": steps, "dt": 0.05}
    assert first_order(errors(make(NETS[net]), controller, (1e-4, 1e-5), True, **step), 1e-4)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("plasticity", ["rate_difference", "voltage_difference", "derivative"])
@pytest.mark.parametrize("controller", gentle, ids=lambda pi: f"{pi.leak}-{pi.k_p}")
def test_so_it_is_for_every_discretisation_and_plasticity(step: str, plasticity: str, controller: PIController) -> None:
    case = make(NETS["two layers"])
    found = errors(case, controller, (1e-4, 1e-5), True, plasticity, steps=80, dt=0.05, **STEPS[step])
    assert first_order(found, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("step", [{}, STEPS["delayed transmission"], STEPS["apical filter"]], ids=str)
@pytest.mark.parametrize("controller", gentle, ids=lambda pi: f"{pi.leak}-{pi.k_p}")
def test_taken_as_settled_it_is_the_simulation_to_first_order_once_that_has_settled(
    net: str, step: dict[str, Any], controller: PIController
) -> None:
    case = make(NETS[net])
    assert first_order(errors(case, controller, (1e-3, 1e-4), False, steps=900, dt=0.1, **step))


@pytest.mark.parametrize("step", [{}, *STEPS.values()], ids=str)
@pytest.mark.parametrize("controller", gentle, ids=lambda pi: f"{pi.leak}-{pi.k_p}")
def test_the_last_state_is_the_simulated_one_to_second_order(step: dict[str, Any], controller: PIController) -> None:
    case, offsets = make(NETS["two layers"]), []
    for stepsize in (1e-3, 1e-4):
        offset = -stepsize * case.loss_grad
        common = (case.forward, offset, controller)
        closed = Trajectory(steps=40, dt=0.05, settled=False, rtol=TIGHT, **step).settle(*common)
        simulated = Euler(steps=40, dt=0.05, **step).settle(*common)
        offsets.append(float((closed.control - simulated.control).norm() / simulated.control.norm()))
        for mine, theirs in zip(closed.response.rates, simulated.response.rates):
            assert close(mine, theirs, stepsize)
        assert torch.allclose(closed.residual, simulated.residual, atol=stepsize)
    assert first_order(offsets, 1e-4)


# Larger λ


@pytest.mark.parametrize(
    ("stepsize", "settled", "stated"), [(0.078 / 128, 2e-5, 5e-6), (0.078, 5e-4, 5e-4), (1.0, 6e-3, 6e-3)]
)
def test_at_the_papers_stepsizes_the_error_is_the_stated_one(stepsize: float, settled: float, stated: float) -> None:
    case: Any = golden(CASES["c"])
    controller = PIController(1.4e-3, 2.0, "control")
    simulated = integrated(case, Euler(), controller, stepsize)[1]
    assert close(integrated(case, Trajectory(), controller, stepsize)[1], simulated, settled)
    assert close(integrated(case, Trajectory(settled=False), controller, stepsize)[1], simulated, stated)


@pytest.mark.slow
@pytest.mark.parametrize("net", ["two layers", "three layers", "leaky relu"])
def test_at_any_stepsize_the_error_falls_with_the_time_simulated(net: str) -> None:
    case, controller = make(NETS[net]), PIController(0.1)
    short, long = (errors(case, controller, (1.0,), False, steps=n, dt=0.1)[0] for n in (600, 2400))
    assert long < 0.3 * short < 0.3 * 3e-2


# Float32, wide outputs


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("stepsize", [6e-4, 1.0])
def test_float32_gives_the_float64_update(exact: bool, stepsize: float) -> None:
    case, controller = make("tanh_ce", batch=32), PIController(1e-3, 2.0)
    method = Trajectory(steps=500, settled=not exact)
    wide, narrow = (integrated(case.to(t), method, controller, stepsize)[1] for t in (torch.float64, torch.float32))
    assert narrow.dtype == torch.float32
    assert close(narrow.double(), wide, 1e-4)


WIDE = ((8, 40, 100), "tanh", "squared")


def test_wide_outputs_are_integrated_like_narrow_ones() -> None:
    assert first_order(errors(make(WIDE), PIController(0.1), (1e-3, 1e-4), False, steps=900, dt=0.1))


# Samples that diverge or have not settled


def explosive(diverging: list[int]) -> Case:
    """W_2 > 0 and Q_1 = −30 W_2ᵀ: positive feedback, through the relu units of the diverging samples only."""
    case = make(((6, 5, 3), "relu", "squared"), batch=5)
    (first, last), biases, phi = case.layers
    up = last.abs()
    feedback = [-30 * up.T, torch.eye(3, dtype=torch.float64)]
    silent = biases[0] - 100  # but where x turns the units on
    case = replace(case, layers=Layers([first, up], [silent, biases[1]], phi), feedback=feedback)
    x = case.x.clone()
    x[diverging] = torch.linalg.lstsq(first, torch.full((5, 1), 300.0, dtype=torch.float64)).solution.T
    case = replace(case, x=x)
    return replace(case, y=case.output() - 1)


@pytest.mark.slow
@pytest.mark.parametrize("diverging", [[], [0], [1, 3], [0, 1, 2, 3, 4]], ids=str)
@pytest.mark.parametrize("plasticity", ["rate_difference", "voltage_difference", "derivative"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_diverged_samples_give_no_update_and_leave_the_others_theirs(
    diverging: list[int], plasticity: Any, dtype: torch.dtype
) -> None:
    case = explosive(diverging).to(dtype)
    method = Trajectory(steps=2000, dt=0.1, settled=False)
    rule = DFC(method, PIController(0.1), integrate=True, plasticity=plasticity)
    update = rule.teach(case.forward, case.loss_grad)
    simulated = replace(rule, settling=Euler(2000, 0.1)).teach(case.forward, case.loss_grad)
    assert update.settled is not None and simulated.settled is not None
    assert (~update.settled.counted(False)).nonzero().flatten().tolist() == diverging
    assert torch.equal(update.settled.counted(False), simulated.settled.counted(False))
    assert not update.settled.converged[diverging].any()
    assert torch.isfinite(flat(update)).all()
    assert close(flat(update), flat(simulated), 1e-4)


@pytest.mark.parametrize("unconverged", ["drop", "keep"])
def test_unconverged_samples_are_those_of_the_simulation_and_dropped_only_when_asked(unconverged: Any) -> None:
    case = make("tanh", batch=8)
    # Targets from near to far, so that the far ones have not settled when the time is over.
    factors = torch.logspace(-4, 1, 8, dtype=torch.float64).unsqueeze(1)
    case = replace(case, y=case.output() + factors * case.y)
    common: Any = {"controller": PIController(0.01), "integrate": True, "unconverged": unconverged}
    common["target_stepsize"] = 0.01
    closed = DFC(Trajectory(steps=90, settled=False, rtol=1e-9), **common)
    update = closed.teach(case.forward, case.loss_grad)
    simulated = DFC(Euler(steps=90), **common).teach(case.forward, case.loss_grad)
    assert update.settled is not None and simulated.settled is not None
    assert 2 <= update.settled.converged.sum() <= 6
    assert torch.equal(update.settled.converged, simulated.settled.converged)
    assert close(flat(update), flat(simulated), 3e-2)


@pytest.mark.parametrize("exact", [True, False])
def test_without_feedback_and_leakage_nothing_settles_and_nothing_is_learned(exact: bool) -> None:
    case = make("tanh").with_feedback(torch.zeros(12, 3, dtype=torch.float64))
    rule = DFC(Trajectory(100, settled=not exact), PIController(0.0), integrate=True)
    update = rule.teach(case.forward, case.loss_grad)
    assert update.settled is not None
    assert not update.settled.converged.any()
    assert not flat(update).any()


@pytest.mark.parametrize("exact", [True, False])
def test_a_sample_whose_target_is_met_from_the_start_stays_where_it_is(exact: bool) -> None:
    case, grad = make("tanh"), make("tanh").loss_grad.clone()
    grad[2] = 0
    rule = DFC(Trajectory(settled=not exact), PIController(0.01), integrate=True)
    update = rule.teach(case.forward, grad)
    rest = case.only(torch.arange(5) != 2)
    others = rule.teach(rest.forward, rest.loss_grad)
    assert update.settled is not None
    assert not update.settled.control[2].any()
    assert close(flat(update), 0.8 * flat(others), 1e-4)


def test_taken_as_settled_it_settles_as_the_steady_state_does() -> None:
    case, controller = make("tanh"), PIController(0.01, 2.0)
    common = (case.forward, -0.1 * case.loss_grad, controller)
    assert torch.equal(Trajectory().settle(*common).control, SteadyState().settle(*common).control)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps=0 is not possible: simulate at least one step"),
        ({"dt": 0.0}, "dt=0.0 is not possible: give a step above zero"),
        ({"dt": 0.5}, "tau_ratio=0.2 is not possible: the step dt=0.5 is larger"),
        ({"apical_tau": 0.01}, "apical_tau=0.01 is not possible: the step dt=0.02 is larger"),
        ({"rtol": 0.0}, "rtol=0.0 is not possible"),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_refused_with_a_remedy(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trajectory(**arguments)


def test_the_exact_last_state_of_a_wide_output_is_refused() -> None:
    with pytest.raises(ValueError, match="settled=False is not possible: with 100 outputs.*use settled=True"):
        integrated(make(WIDE), Trajectory(settled=False), PIController(0.1), 0.1)
