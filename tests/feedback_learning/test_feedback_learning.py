"""Feedback learning: the expectation is that of the simulation, and steps are reproducible and safe."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cases.chains import Case, make
from torch import Tensor, nn

from dfc_lightning.feedback_learning import Expected, FeedbackLearner, FeedbackLearning, Sampled
from dfc_lightning.feedback_learning.expected import CLOSED_FORM_UP_TO, EVERY_SAMPLE_UP_TO
from dfc_lightning.feedback_learning.layers import LayerGroups
from dfc_lightning.feedback_learning.learner import Ranks
from dfc_lightning.feedback_learning.method import Noise
from dfc_lightning.feedback_learning.phase import largest_gain, turns
from dfc_lightning.network.controlled_network import ControlledNetwork

SETTINGS = {
    "paper": {},
    "integral leak, no proportional part": {"k_p": 0.0, "leak": "integral"},
    "quiet output": {"sigma_output": 0.0},
    "instant system": {"instant_system": True},
    "delayed transmission": {"instant_transmission": False},
    "two steps": {"steps": 2},
    "long": {"steps": 200, "dt": 0.02, "tau_ratio": 0.1},
}
STRENGTHS = [(s, name) for name in SETTINGS for s in (0.0, 1.0, 10.0, 100.0) if name != "long" or s <= 1]
"""Of the feedback, with settings; long phases of strong feedback are unstable, and leave the linear range."""


def normal(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)


def by_pulses(method: Sampled, case: Case) -> Tensor:
    """The mean over the noise: as the gradient is quadratic in it, the sum of what each single draw's pulse gives."""
    units = sum(case.forward.widths)
    pulses = torch.eye(method.steps * units, dtype=torch.float64).view(-1, method.steps, units)
    each = pulses.repeat(len(case.x), 1, 1).unbind(1)
    many = case.forward.samples(torch.arange(len(case.x)).repeat_interleave(len(pulses)))
    draws = iter(each)
    return torch.cat(method.gradient(many, lambda shape: next(draws))) * len(pulses)


@pytest.mark.parametrize(("strength", "settings"), STRENGTHS)
@pytest.mark.parametrize("net", ["tanh", "relu", "one_layer", "one_output", ((4, 3, 5, 2), "sigmoid", "squared")])
def test_the_expected_gradient_is_the_mean_over_the_noise(net: str, strength: float, settings: str) -> None:
    """Feedback of any strength: few turns of the loop where it is weak, time steps where it is strong."""
    case = make(net, "unruly", batch=2)
    case = case.with_feedback(strength * case.forward.stacked_feedback)
    arguments = {"steps": 20, "sigma": 1e-9, **SETTINGS[settings]}
    if settings == "long":
        arguments["steps"] = 60
    theirs = by_pulses(Sampled(**arguments), case)
    ours = torch.cat(Expected(**arguments).gradient(case.forward, normal(0)))
    assert (ours - theirs).norm() <= 1e-7 * theirs.norm()


def test_both_ways_through_the_loop_are_tested() -> None:
    counts = []
    for strength in (1.0, 100.0):
        case = make("tanh", "unruly")
        case = case.with_feedback(strength * case.forward.stacked_feedback)
        gain = largest_gain(LayerGroups(case.forward).jacobians_and_gains()[1])
        counts.append(turns(Sampled().phase(case.forward.depth), gain, 1e-14))
    assert counts[0] is not None and counts[1] is None


@pytest.mark.parametrize(("strength", "settings"), STRENGTHS)
def test_a_draw_of_small_layers_is_the_simulation_of_its_noise(strength: float, settings: str) -> None:
    """Layers no wider than the output have every draw of their units made."""
    case = make(((6, 3, 4, 5), "tanh", "squared"), "unruly")
    case = case.with_feedback(strength * case.forward.stacked_feedback)
    arguments = {"steps": 30, "sigma": 1e-9, **SETTINGS[settings]}
    taken: list[Tensor] = []
    noise = normal(0)

    def drawn(shape: tuple[int, int]) -> Tensor:
        taken.append(noise(shape))
        return taken[-1]

    ours = Sampled(**arguments).draw(case.forward, drawn)
    units = [draws.view(len(case.x), -1, arguments["steps"]) for draws in taken if draws.numel()]
    steps = iter(nn.functional.pad(torch.cat(units, dim=1), (0, 0, 0, 12 - sum(u.shape[1] for u in units))).unbind(2))
    theirs = torch.cat(Sampled(**arguments).gradient(case.forward, lambda shape: next(steps).clone()))
    assert (torch.cat(ours) - theirs).norm() < 1e-6 * theirs.norm()


@pytest.mark.slow
@pytest.mark.parametrize("settings", ["paper", "quiet output", "instant system", "delayed transmission", "long"])
@pytest.mark.parametrize("net", ["tanh", "relu", "tanh_ce", "one_output"])
def test_draws_have_the_law_of_the_simulation(net: str, settings: str) -> None:
    """Mean and variance of each entry, over draws and over simulations."""
    case = make(net, "random")
    method, count = Sampled(**{"sigma": 1e-6, **SETTINGS[settings], "steps": 20}), 120
    many = case.forward.samples(torch.arange(len(case.x)).repeat(10))
    noise = normal(2)
    simulated = torch.stack([torch.cat(method.gradient(many, noise)) for _ in range(count)])
    drawn = torch.stack([torch.cat(method.draw(many, noise)) for _ in range(count)])
    moves = simulated.var(0) > 0
    assert torch.equal(drawn.var(0) > 0, moves)
    mean = (simulated - drawn).mean(0)[moves] / ((simulated.var(0) + drawn.var(0))[moves] / count).sqrt()
    spread = (simulated.var(0) / drawn.var(0))[moves].log() / (4 / count) ** 0.5
    # 1 by chance, of few entries that depend on each other.
    assert mean.square().mean().sqrt() < 2
    assert spread.square().mean().sqrt() < 2


def test_what_is_left_out_of_a_draw_is_of_the_order_of_the_noise() -> None:
    case = make(((6, 3, 4, 5), "tanh", "squared"), "unruly")
    errors = []
    for sigma in (1e-2, 1e-3):
        method, noise = Sampled(sigma=sigma), normal(5)
        kept: list[Tensor] = []

        def keep(shape: tuple[int, int], noise: Noise = noise, kept: list[Tensor] = kept) -> Tensor:
            kept.append(noise(shape))
            return kept[-1]

        ours = torch.cat(method.draw(case.forward, keep))
        steps = iter(torch.cat([k.view(len(case.x), -1, method.steps) for k in kept], dim=1).unbind(2))
        theirs = torch.cat(method.gradient(case.forward, lambda shape, steps=steps: next(steps).clone()))
        errors.append(float((ours - theirs).norm() / theirs.norm()))
    assert errors[0] < 1e-2
    assert 5 < errors[0] / errors[1] < 20


@pytest.mark.parametrize("method", [Sampled(steps=10), Expected(steps=10)], ids=["sampled", "expected"])
def test_units_that_move_nothing_leave_no_nan(method: Sampled) -> None:
    case = make(((6, 5, 8, 3), "relu", "squared"), "random")
    dead = replace(case, layers=case.layers._replace(biases=[b - 100 for b in case.layers.biases]))
    gradients = method.draw(dead.forward, normal(0))
    assert all(torch.isfinite(g).all() for g in gradients)


def test_the_expected_gradient_is_the_noise_free_part_of_a_noisy_one() -> None:
    case = make("tanh_ce", "random", batch=32)
    arguments = {"steps": 30, "sigma": 1e-6}
    noise = normal(1)
    mean = torch.cat(Expected(**arguments).gradient(case.forward, noise))
    draws = torch.stack([torch.cat(Sampled(**arguments).gradient(case.forward, noise)) for _ in range(64)])
    signal, scatter = mean.norm(), (draws - mean).norm(dim=(1, 2))
    assert scatter.mean() > 0.5 * signal  # one draw is mostly noise
    assert (draws.mean(0) - mean).norm() < 2 * scatter.mean() / 8  # which averages out


def test_float32_gradients_agree_with_float64() -> None:
    case = make("tanh_ce", "random")
    exact = Expected().gradient(case.forward, normal(0))
    small = case.to(torch.float32)
    for mine, theirs in zip(Expected().gradient(small.forward, normal(0)), exact):
        assert mine.dtype == torch.float32
        assert (mine.double() - theirs).norm() < 1e-4 * theirs.norm()


def test_wide_outputs_cost_accuracy_of_one_in_ten_thousand() -> None:
    case = make(((6, 7, EVERY_SAMPLE_UP_TO + 1), "tanh", "squared"), "random", batch=2)
    arguments = {"steps": 10, "sigma": 1e-9}
    theirs = by_pulses(Sampled(**arguments), case)
    ours = torch.cat(Expected(**arguments).gradient(case.forward, normal(0)))
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_wide_outputs_learn_from_part_of_the_joint_batch(world_size: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(24, 5, dtype=torch.float64)
    method = Expected(steps=5)
    taken: list[Tensor] = []

    def mean(flat: Tensor) -> Tensor:
        taken.append(flat)
        return flat

    for rank in range(world_size):
        torch.manual_seed(1)
        net = ControlledNetwork(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 50)).double(), seed=0)
        forward = net.observe(x[rank::world_size])
        whole = net.observe(x).with_feedback([q.detach().clone() for q in net.feedback])
        learning = FeedbackLearning(method=method, clip_norm=None)
        metrics = FeedbackLearner(net, learning, 3, Ranks(rank, world_size, mean)).step(forward)
    every = method.every_nth_sample(whole)
    assert every == math.ceil((50 / EVERY_SAMPLE_UP_TO) ** 2) == 7
    exact = torch.cat(method.gradient(whole.samples(torch.arange(0, 24, every)), normal(0))).flatten()
    joint = sum(taken) / world_size if world_size > 1 else None
    if joint is not None:
        assert (joint - exact).norm() < 1e-3 * exact.norm()
    else:
        assert abs(float(metrics["grad_norm"]) - float(exact.norm())) < 1e-3 * float(exact.norm())


def test_the_widest_outputs_are_sampled() -> None:
    case = make(((6, 5, CLOSED_FORM_UP_TO + 1), "tanh", "squared"), "random")
    wide = Expected(steps=5).gradient(case.forward, normal(3))
    for mine, theirs in zip(wide, Sampled(steps=5).gradient(case.forward, normal(3))):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("net", [(6, 5, 4, 9), (6, 8, 3, 7, 12)])
def test_a_wide_output_without_noise_is_simulated_in_the_range_of_its_weights(net: tuple[int, ...]) -> None:
    case = make((net, "tanh", "squared"), "random")
    hidden, size = sum(net[1:-1]), len(case.x)
    draws = torch.randn(30, size, hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def padded(method: Sampled) -> list[Tensor]:
        each = iter(draws)
        return method.gradient(case.forward, lambda shape: nn.functional.pad(next(each), (0, shape[1] - hidden)))

    reduced = padded(Sampled(steps=30, sigma_output=0.0))
    assert case.forward.reducible
    for mine, theirs in zip(reduced, padded(Sampled(steps=30, sigma_output=1e-300))):  # not zero, so not reduced
        assert (mine - theirs).norm() < 1e-10 * theirs.norm()


@pytest.mark.slow
@pytest.mark.parametrize("method", [Expected(steps=20), Sampled(steps=20)], ids=["expected", "sampled"])
def test_theorem_6_holds_in_training_passes(method: Sampled) -> None:
    """Feedback weights that start at random come to satisfy Condition 2 on a linear network."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 7), nn.Linear(7, 6), nn.Linear(6, 3)).double()
    net = ControlledNetwork(module, feedback_init="xavier_normal", seed=1)
    learner = FeedbackLearner(net, FeedbackLearning(method=method, lr=1e-2, weight_decay=0.1))
    x = torch.randn(64, 8, dtype=torch.float64)

    def condition_two() -> Tensor:
        jacobian, q = net.jacobian(x)[0], torch.cat([q.detach() for q in net.feedback])
        return (torch.linalg.pinv(jacobian) @ jacobian @ q).norm() / q.norm()

    before = condition_two()
    for _ in range(600):
        learner.step(net.observe(x))
    assert before < 0.8
    assert condition_two() > 0.98


def small_net() -> tuple[ControlledNetwork, Tensor]:
    torch.manual_seed(0)
    return ControlledNetwork(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), seed=0), torch.randn(6, 5)


def test_steps_follow_from_seed_and_count_alone() -> None:
    results = []
    for _ in range(2):
        net, x = small_net()
        torch.randn(7)  # the global generator plays no part
        learner = FeedbackLearner(net, FeedbackLearning(method=Sampled(steps=5)), seed=3)
        for _ in range(3):
            learner.step(net.observe(x))
        results.append(net.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_frozen_output_keeps_the_identity() -> None:
    net, x = small_net()
    learner = FeedbackLearner(net, FeedbackLearning(train_output=False))
    learner.step(net.observe(x))
    assert torch.equal(net.feedback[-1].detach(), torch.eye(3))
    fresh, _ = small_net()
    fresh.observe(x)
    assert not torch.equal(net.feedback[0].detach(), fresh.feedback[0].detach())


def test_a_gradient_that_is_not_finite_is_not_taken() -> None:
    net, x = small_net()
    learner = FeedbackLearner(net, FeedbackLearning())
    net.observe(x)
    before = net.state_dict()
    metrics = learner.step(net.observe(torch.full_like(x, torch.inf)))
    assert not torch.isfinite(metrics["grad_norm"])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_ranks_share_the_noise_of_the_joint_batch() -> None:
    net, x = small_net()
    learning = FeedbackLearning(method=Sampled(steps=5), clip_norm=None)
    whole = FeedbackLearner(net, learning, seed=3)
    parts = []
    for rank in range(2):
        taken: list[Tensor] = []

        def mean(flat: Tensor, taken: list[Tensor] = taken) -> Tensor:
            taken.append(flat)
            return flat

        share = small_net()[0]
        FeedbackLearner(share, learning, 3, Ranks(rank, 2, mean)).step(share.observe(x[rank::2]))
        parts.append(taken[0])
    metrics = whole.step(net.observe(x))
    assert torch.allclose(((parts[0] + parts[1]) / 2).norm(), metrics["grad_norm"], rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"lr": 0.0}, "lr"),
        ({"initial_lr": -1.0}, "initial_lr"),
        ({"initial_passes": -1}, "initial_passes"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"clip_norm": 0.0}, "clip_norm"),
    ],
)
def test_bad_settings_are_named(arguments: dict, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        FeedbackLearning(**arguments)
    with pytest.raises(ValueError, match="dt="):
        replace(Sampled(), dt=0.0)
