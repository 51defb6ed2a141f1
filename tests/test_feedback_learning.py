"""Feedback learning: the expectation is that of the simulation, and steps are reproducible and safe."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import make
from torch import Tensor, nn

from dfc_lightning.control.network import ControlledNetwork
from dfc_lightning.feedback_learning import Expected, FeedbackLearner, FeedbackLearning, Sampled
from dfc_lightning.feedback_learning.expected import CLOSED_FORM_UP_TO
from dfc_lightning.feedback_learning.learner import Ranks

SETTINGS = {
    "paper": {},
    "integral leak, no proportional part": {"k_p": 0.0, "leak": "integral"},
    "quiet output": {"sigma_output": 0.0},
    "instant system": {"instant_system": True},
    "long": {"steps": 200, "dt": 0.02, "tau_ratio": 0.1},
}
DRAWS, BLOCKS = 400, 16


def normal(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("net", ["tanh", "relu", "one_layer", "one_output"])
def test_the_expected_gradient_is_the_mean_of_sampled_ones(net: str, settings: str) -> None:
    case = make(net, "random")
    arguments = {"steps": 30, "sigma": 1e-6, **SETTINGS[settings]}
    many = case.activity.samples(torch.arange(len(case.x)).repeat(DRAWS))
    noise = normal(0)
    sampled = [Sampled(**arguments).gradient(case.chain, many, noise) for _ in range(BLOCKS)]
    expected = Expected(**arguments).gradient(case.chain, case.activity, noise)
    draws = torch.stack([torch.cat(block) for block in sampled])
    theirs = torch.cat(expected)
    spread = draws.std(0) / BLOCKS**0.5
    silent = spread == 0  # as the gradient of a layer without noise, upstream of none
    assert torch.equal(theirs[silent], torch.zeros_like(theirs[silent]))
    z = ((draws.mean(0) - theirs) / spread)[~silent]
    # Student's t of 15 degrees has rms 1.07, here of few independent entries.
    assert len(z) == 0 or z.square().mean().sqrt() < 1.8


def test_the_expected_gradient_is_the_noise_free_part_of_a_noisy_one() -> None:
    case = make("tanh_ce", "random", batch=32)
    arguments = {"steps": 30, "sigma": 1e-6}
    noise = normal(1)
    mean = torch.cat(Expected(**arguments).gradient(case.chain, case.activity, noise))
    draws = torch.stack([torch.cat(Sampled(**arguments).gradient(case.chain, case.activity, noise)) for _ in range(64)])
    signal, scatter = mean.norm(), (draws - mean).norm(dim=(1, 2))
    assert scatter.mean() > 0.5 * signal  # one draw is mostly noise
    assert (draws.mean(0) - mean).norm() < 2 * scatter.mean() / 8  # which averages out


def test_float32_gradients_agree_with_float64() -> None:
    case = make("tanh_ce", "random")
    exact = Expected().gradient(case.chain, case.activity, normal(0))
    small = case.to(torch.float32)
    for mine, theirs in zip(Expected().gradient(small.chain, small.activity, normal(0)), exact):
        assert mine.dtype == torch.float32
        assert (mine.double() - theirs).norm() < 1e-4 * theirs.norm()


def test_wide_outputs_are_sampled() -> None:
    case = make(((6, 5, CLOSED_FORM_UP_TO + 1), "tanh", "squared"), "random")
    wide = Expected(steps=5).gradient(case.chain, case.activity, normal(3))
    for mine, theirs in zip(wide, Sampled(steps=5).gradient(case.chain, case.activity, normal(3))):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("net", [(6, 5, 4, 9), (6, 8, 3, 7, 12)])
def test_a_wide_output_without_noise_is_simulated_in_the_range_of_its_weights(net: tuple[int, ...]) -> None:
    case = make((net, "tanh", "squared"), "random")
    hidden, size = sum(net[1:-1]), len(case.x)
    draws = torch.randn(30, size, hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def padded(method: Sampled) -> list[Tensor]:
        each = iter(draws)
        return method.gradient(
            case.chain, case.activity, lambda shape: nn.functional.pad(next(each), (0, shape[1] - hidden))
        )

    reduced = padded(Sampled(steps=30, sigma_output=0.0))
    assert case.chain.reducible
    for mine, theirs in zip(reduced, padded(Sampled(steps=30, sigma_output=1e-300))):  # not zero, so not reduced
        assert (mine - theirs).norm() < 1e-10 * theirs.norm()


def test_delayed_transmission_is_refused_by_the_closed_form() -> None:
    with pytest.raises(ValueError, match="instant_transmission=False.*Sampled"):
        Expected(instant_transmission=False)


@pytest.mark.parametrize("method", [Expected(steps=20), Sampled(steps=20)], ids=["expected", "sampled"])
def test_theorem_6_holds_in_training_passes(method: Sampled) -> None:
    """Feedback weights that start at random come to satisfy Condition 2 on a linear network."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 7), nn.Linear(7, 6), nn.Linear(6, 3)).double()
    net = ControlledNetwork(module, feedback_init="xavier_normal", seed=1)
    learner = FeedbackLearner(net, FeedbackLearning(method=method, lr=1e-2, weight_decay=0.1))
    x = torch.randn(64, 8, dtype=torch.float64)

    def condition_two() -> Tensor:
        jacobian, q = net.jacobian(x)[0], net.chain().stacked_feedback
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
    assert not torch.equal(net.feedback[0].detach(), small_net()[0].feedback[0].detach())


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
