"""Gated feedback learning: a unit learns from the samples in which it is active, by whichever method."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases.chains import Case, close, make
from cases.graphs import GraphCase
from torch import Tensor, nn

from dfc_lightning import ControlledNetwork, FeedbackLearner, FeedbackLearning
from dfc_lightning.feedback_learning import Expected, Sampled
from dfc_lightning.feedback_learning.learner import Ranks

RELU = ((7, 9, 8, 3), "relu", "squared")
PHASE = dict(steps=6, dt=0.05, tau_ratio=0.1, apical_tau=0.2, sigma=1e-4, gated=True)


def relu(batch: int = 6) -> Case:
    return make(RELU, "random", batch)


def sample_by_sample(method: Sampled, case: Case, how: str, noise: list[Tensor]) -> list[Tensor]:
    """The ungated gradient of each sample alone, summed where its unit is active, over the batch's size."""
    total = [torch.zeros_like(q) for q in case.forward.feedback]
    for b in range(len(case.x)):
        given = iter([n[b : b + 1] for n in noise])
        one = case.forward.samples(torch.tensor([b]))
        found = getattr(replace(method, gated=False), how)(one, lambda shape, given=given: next(given))
        for sums, gradient, v in zip(total[:-1], found[:-1], one.v[:-1]):
            sums += gradient * (v[0] > 0).unsqueeze(1) / len(case.x)
        total[-1] += found[-1] / len(case.x)
    return total


def test_the_expected_gradient_is_summed_over_the_samples_of_an_active_unit():
    case, method = relu(), Expected(**PHASE)
    found = method.draw(case.forward, torch.randn)
    assert close(torch.cat(found), torch.cat(sample_by_sample(method, case, "draw", [])), 1e-10)
    assert not close(found[0], Expected(**{**PHASE, "gated": False}).draw(case.forward, torch.randn)[0], 0.1)


def test_the_simulated_gradient_likewise():
    case, method = relu(), Sampled(**PHASE)
    torch.manual_seed(0)
    noise = [torch.randn(6, 20, dtype=torch.float64) for _ in range(6)]
    given = iter([n.clone() for n in noise])
    found = method.gradient(case.forward, lambda shape: next(given))
    assert close(torch.cat(found), torch.cat(sample_by_sample(method, case, "gradient", noise)), 1e-10)


@pytest.mark.parametrize("net", [RELU, ((7, 40, 3), "relu", "squared")], ids=["narrow", "wide"])
def test_draws_have_the_expected_gradient_for_their_mean(net):
    case = make(net, "random", 3)
    torch.manual_seed(0)
    draws = torch.stack(
        [
            torch.cat(Sampled(**PHASE).draw(case.forward, lambda s: torch.randn(s, dtype=torch.float64)))
            for _ in range(400)
        ]
    )
    expected = torch.cat(Expected(**PHASE).draw(case.forward, torch.randn))
    spread = draws.std(0).norm() / len(draws) ** 0.5
    assert spread < 0.7 * expected.norm() and (draws.mean(0) - expected).norm() < 1.4 * spread
    silent = ~(case.forward.v[0] > 0).any(0)
    assert not draws[:, : len(silent)][:, silent].any()


def test_where_no_unit_is_ever_silent_it_changes_nothing():
    case = make("tanh", "random")
    ungated = Expected(**{**PHASE, "gated": False}).draw(case.forward, torch.randn)
    assert close(torch.cat(Expected(**PHASE).draw(case.forward, torch.randn)), torch.cat(ungated), 1e-12)


def first_step(gated: bool, x: Tensor, module: nn.Module, ranks: Ranks | None = None) -> list[Tensor]:
    """The gradients that the optimizer of the feedback weights is handed."""
    net = ControlledNetwork(module, feedback_init="normal", seed=0)
    learning = FeedbackLearning(Expected(**{**PHASE, "gated": gated}), clip_norm=None)
    seen: list[Tensor] = []
    learner = FeedbackLearner(net, learning, ranks=ranks)
    forward = net.observe(x)
    hooks = [q.register_post_accumulate_grad_hook(lambda p: None) for q in net.feedback]
    original = torch.nn.utils.clip_grad_norm_
    torch.nn.utils.clip_grad_norm_ = lambda ps, bound: (seen.extend(p.grad.clone() for p in ps), original(ps, bound))[1]
    try:
        learner.step(forward)
    finally:
        torch.nn.utils.clip_grad_norm_ = original
        for hook in hooks:
            hook.remove()
    return seen


def relu_net() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).double()


def test_a_step_takes_the_mean_over_those_samples():
    module = relu_net()
    x = torch.randn(8, 6, dtype=torch.float64)
    found = first_step(True, x, module)
    active = (module[0](x) > 0).double().detach()
    total = torch.zeros_like(found[0])
    for b in range(8):
        total += first_step(False, x[b : b + 1], module)[0] * active[b].unsqueeze(1)
    assert close(found[0], total / active.sum(0).clamp_min(1).unsqueeze(1), 1e-10)


def test_two_ranks_take_the_mean_over_those_of_the_joint_batch():
    module = relu_net()
    x = torch.randn(8, 6, dtype=torch.float64)
    together = first_step(True, x, module)
    parts: list[Tensor] = []

    def sent(tensor: Tensor) -> Tensor:
        parts.append(tensor)
        return tensor

    for rank in (0, 1):
        first_step(True, x[rank::2], module, Ranks(rank, 2, sent))
    assert len(parts) == 2
    for rank in (0, 1):
        found = first_step(True, x[rank::2], module, Ranks(rank, 2, lambda tensor: (parts[0] + parts[1]) / 2))
        assert close(torch.cat(found), torch.cat(together), 1e-10)


def test_of_the_units_in_a_window_of_max_pooling_the_largest_learns():
    case = GraphCase("plain", batch=1, feedback_init="normal")
    gradient = Expected(**PHASE).draw(case.forward, torch.randn)[0]
    v = torch.relu(case.forward.v[0]).requires_grad_()
    wins = torch.autograd.grad(nn.functional.max_pool2d(v, 3, 1, 1).sum(), v)[0].flatten() * (v.flatten() > 0)
    assert torch.equal(gradient.any(1), wins > 0) and 0 < (wins > 0).sum() < len(wins)
