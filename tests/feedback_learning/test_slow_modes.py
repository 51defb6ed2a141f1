"""Draws in few functions of time are, to what is left out, the simulation of the noise they stand for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases.chains import Case, make
from torch import Tensor

from dfc_lightning.feedback_learning import Expected, Sampled
from dfc_lightning.feedback_learning.sampled import DRAWN_UP_TO
from dfc_lightning.feedback_learning.slow_modes import LOST, Modes, drawn_in_modes, modes

AUTOENCODER: dict[str, Any] = dict(
    steps=59,
    dt=3.2645e-3,
    tau_ratio=6.4873e-3,
    apical_tau=0.27254,
    alpha=0.73325,
    k_p=0.0063224,
    sigma=1e-9,
    sigma_output=0.0,
)
"""The published phase of the autoencoder, with noise small enough to be in the linear range."""
INTEGRAL = {**AUTOENCODER, "k_p": 0.0, "steps": 90}
SETTINGS: dict[str, dict[str, Any]] = {
    "autoencoder": AUTOENCODER,
    "noisy output": {**INTEGRAL, "sigma_output": 5e-10},
    "leaking integral": {**INTEGRAL, "leak": "integral", "k_p": 1e-4},
    "instant system": {**INTEGRAL, "instant_system": True, "k_p": 1e-4},
    "delayed transmission": {**INTEGRAL, "instant_transmission": False},
}


def wide(batch: int = 3, strength: float = 1.0, phi: str = "tanh") -> Case:
    """More outputs than ``DRAWN_UP_TO``, beside a code of few units."""
    case = make(((6, 33, 5, 34, DRAWN_UP_TO + 4), phi, "squared"), "unruly", batch)
    return case.with_feedback(strength * case.forward.stacked_feedback)


def draws(plan: Modes) -> list[Tensor | None]:
    return [None if noise is None else noise.draws for noise in plan.noises]


def both(method: Sampled, case: Case, lost: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The sums by few functions of time, and by simulation of the same noise."""
    phase, sigmas = method.phase(case.forward.depth), method._relative_sigmas(case.forward.depth)
    plan = modes(phase, tuple(sigmas), lost, torch.float64, torch.device("cpu"))
    assert plan is not None
    generator = torch.Generator().manual_seed(seed)
    shape = (len(case.x), sum(case.forward.widths), method.steps)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    heard = iter(
        [
            (n @ rows.T).transpose(1, 2).flatten(1)
            for n, rows in zip(noise.split(case.forward.widths, dim=1), draws(plan))
            if rows is not None
        ]
    )
    found = drawn_in_modes(case.forward, phase, sigmas, lambda _: next(heard), method.gated, lost)
    assert found is not None and next(heard, None) is None
    steps = iter(noise.unbind(2))
    simulated = method.gradient(case.forward, lambda _: next(steps).clone())
    scale = (method.sigma * method.dt**0.5 / method.apical_tau / max(method.sigma, 0.01)) ** 2
    return torch.cat(found) * scale / (method.steps * len(case.x)), torch.cat(simulated)


@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("strength", [0.0, 1.0, 20.0])
@pytest.mark.parametrize("settings", SETTINGS)
def test_it_is_the_simulation_of_its_noise(settings: str, strength: float, gated: bool) -> None:
    """Within what may be left out, the nearer the less that is, however often the loop is gone through."""
    case = wide(strength=strength, phi="relu" if gated else "tanh")
    method = Sampled(**SETTINGS[settings], gated=gated)
    for lost in (LOST, 1e-5):
        found, simulated = both(method, case, lost)
        assert (found - simulated).norm() < lost**0.5 * simulated.norm()


def test_few_functions_of_time_serve_the_autoencoder() -> None:
    method = Sampled(**AUTOENCODER)
    plan = modes(method.phase(4), tuple(method._relative_sigmas(4)), LOST, torch.float64, torch.device("cpu"))
    assert plan is not None and len(plan.heard) <= 10
    assert all(rows is None or len(rows) <= 15 for rows in draws(plan)) and draws(plan)[-1] is None
    for rows in draws(plan)[:-1]:
        assert rows is not None
        assert torch.allclose(rows @ rows.T, torch.eye(len(rows), dtype=torch.float64), atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("settings", ["autoencoder", "noisy output"])
def test_a_feedback_step_draws_from_the_law_of_the_simulation(settings: str) -> None:
    """Mean and variance of each entry, over draws and over simulations."""
    case, count = wide(batch=8), 150
    method = Sampled(**SETTINGS[settings])
    generator = torch.Generator().manual_seed(1)

    def noise(shape: tuple[int, int]) -> Tensor:
        asked.append(shape)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    asked: list[tuple[int, int]] = []
    drawn = torch.stack([torch.cat(method.draw(case.forward, noise)) for _ in range(count)])
    assert len(asked) <= 4 * count  # not one a step
    simulated = torch.stack([torch.cat(method.gradient(case.forward, noise)) for _ in range(count)])
    moves = simulated.var(0) > 0
    assert torch.equal(drawn.var(0) > 0, moves)
    mean = (simulated - drawn).mean(0)[moves] / ((simulated.var(0) + drawn.var(0))[moves] / count).sqrt()
    spread = (simulated.var(0) / drawn.var(0))[moves].log() / (4 / count) ** 0.5
    assert mean.square().mean().sqrt() < 1.5  # 1 by chance
    assert spread.square().mean().sqrt() < 1.5


@pytest.mark.slow
def test_the_mean_of_draws_is_the_expected_gradient() -> None:
    case = wide(batch=2)
    arguments = {**AUTOENCODER, "sigma": 1e-6}
    noise = torch.Generator().manual_seed(2)
    many = case.forward.samples(torch.arange(2).repeat(2000))
    drawn = [
        torch.cat(Sampled(**arguments).draw(many, lambda s: torch.randn(s, generator=noise, dtype=torch.float64)))
        for _ in range(20)
    ]
    mean = torch.cat(Expected(**arguments).gradient(case.forward, torch.randn))
    found = torch.stack(drawn)
    chance = found.std(0).norm() / len(found) ** 0.5
    assert chance < 0.2 * mean.norm()
    assert (found.mean(0) - mean).norm() < 1.3 * chance


def simulates(method: Sampled, case: Case) -> bool:
    """Whether a draw is the simulation."""
    draws = [torch.Generator().manual_seed(3) for _ in range(2)]
    one, other = (
        torch.cat(how(case.forward, lambda s, g=g: torch.randn(s, generator=g, dtype=torch.float64)))
        for how, g in zip((method.draw, method.gradient), draws)
    )
    return torch.equal(one, other)


def test_where_many_functions_are_needed_the_units_are_simulated() -> None:
    """Noise of the output's own moves the control at every step, through the proportional gain."""
    assert simulates(Sampled(**{**AUTOENCODER, "k_p": 0.2, "sigma_output": 1e-9}), wide())
    assert not simulates(Sampled(**AUTOENCODER), wide())


def test_where_turns_of_the_loop_do_not_settle_no_draw_is_made() -> None:
    case = wide(strength=100.0)
    method = Sampled(**AUTOENCODER)
    sigmas = method._relative_sigmas(4)
    found = drawn_in_modes(case.forward, method.phase(4), sigmas, lambda s: torch.randn(s).double())
    assert found is None


def test_dead_networks_leave_no_nan() -> None:
    case = wide(phi="relu")
    dead = replace(case, x=-1e3 * case.x.abs())
    for gated in (False, True):
        method = Sampled(**AUTOENCODER, gated=gated)
        found = method.draw(dead.forward, lambda s: torch.randn(s, dtype=torch.float64))
        assert all(torch.isfinite(g).all() for g in found)
    silent = replace(case.with_feedback(0 * case.forward.stacked_feedback), x=torch.zeros_like(case.x))
    found = Sampled(**AUTOENCODER).draw(silent.forward, lambda s: torch.randn(s, dtype=torch.float64))
    assert all(torch.isfinite(g).all() for g in found)
