"""Feedback weights that a rule has updates for learn by them, with an optimizer of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from cases.chains import close
from cases.fits import SHORT, Innocent, clusters, differing, loader, quiet, saver, strategy, weights
from cases.interruptions import Interrupt, raise_at
from cases.processes import Witnessed, fit, furthest, learned, trained_on_two
from torch import Tensor, nn

from dfc_lightning import (
    ControlledNetwork,
    Direct,
    FeedbackLearning,
    ForwardPass,
    Layerwise,
    LearningRule,
    StrongDFC,
    StrongSampled,
    Update,
)
from dfc_lightning.settling import StrongSimulation


class Hebbian(LearningRule):
    """W by backprop; Q_i towards v_i r_Lᵀ, in the mean over the batch."""

    feedback: ClassVar[Direct] = Direct(init="xavier_normal")

    def teach(self, forward: ForwardPass, loss_grad: Tensor) -> Update:
        q, v = forward.feedback, forward.gathered(forward.v)
        taught = [each - rows.T @ forward.output / forward.batch_size for each, rows in zip(q, v)]
        return Update(forward.gradients(forward.pull(loss_grad)), feedback=taught)


class Mirrored(LearningRule):
    """W by backprop, and B_i as W_i."""

    feedback: ClassVar[Layerwise] = Layerwise()

    def teach(self, forward: ForwardPass, loss_grad: Tensor) -> Update:
        taught = forward.gradients(forward.pull(loss_grad))
        return Update(taught, feedback=[each[0].clone() for each in taught])


QUICK = FeedbackLearning(initial_passes=0, passes_per_epoch=0, lr=0.05, clip_norm=0.3)
PASSES = FeedbackLearning(method=SHORT, initial_passes=1, passes_per_epoch=1, every_n_batches=2)


# As a loop of one's own


def hebbian(q: list[Tensor], v: list[Tensor], output: Tensor, layers: list[nn.Linear]) -> list[Tensor]:
    return [each - torch.einsum("bi,bo->io", voltage, output) / len(output) for each, voltage in zip(q, v)]


def mirrored(q: list[Tensor], v: list[Tensor], output: Tensor, layers: list[nn.Linear]) -> list[Tensor]:
    return [layer.weight.grad.clone() for layer in layers]


def by_hand(module: Innocent, rule: LearningRule, teach: Callable[..., list[Tensor]], learning: Any) -> list[Tensor]:
    """Two epochs by autograd, and the feedback weights after them."""
    data = list(loader(clusters(dtype=torch.float64)))
    network = ControlledNetwork(module, seed=7)
    with torch.no_grad():
        network.observing(lambda: module(data[0][0]), rule.feedback)
    feedback = [nn.Parameter(q.detach().clone()) for q in network.feedback]
    lr, bound = (3e-3, torch.inf) if learning is None else (learning.lr, learning.clip_norm)
    decay = 0.0 if learning is None else learning.weight_decay
    own, theirs = torch.optim.Adam(feedback, lr, weight_decay=decay), module.configure_optimizers()
    for _ in range(2):
        for x, y in data:
            v, layers = [], [module.net[0], module.net[2], module.net[4]]
            hooks = [layer.register_forward_hook(lambda m, args, out, v=v: v.append(out.detach().clone()))
                     for layer in layers]  # fmt: skip
            output = module(x)
            [hook.remove() for hook in hooks]
            theirs["optimizer"].zero_grad()
            F.cross_entropy(output, y).backward()
            for q, taught in zip(feedback, teach(feedback, v, output.detach(), layers)):
                q.grad = taught.detach()
            torch.nn.utils.clip_grad_norm_(feedback, bound)
            own.step()
            theirs["optimizer"].step()
        theirs["lr_scheduler"].step()
    return feedback


@pytest.mark.parametrize(
    ("rule", "teach", "learning"),
    [(Hebbian(), hebbian, None), (Hebbian(), hebbian, QUICK), (Mirrored(), mirrored, None)],
    ids=["direct", "direct, with settings of its own", "layerwise"],
)
def test_the_strategy_does_what_a_loop_by_hand_does(rule, teach, learning):
    ours, mine = Innocent().double(), Innocent().double()
    s = strategy(rule=rule, feedback=learning)
    quiet(s).fit(ours, loader(clusters(dtype=torch.float64)))
    feedback = by_hand(mine, rule, teach, learning)
    assert close(weights(ours), weights(mine), 1e-10)
    assert s.learner.steps == 2 * 5
    for found, expected in zip(s.network.feedback, feedback):
        assert close(found.detach(), expected.detach(), 1e-10)


# Several processes, and runs that were broken off


def convolutions() -> Witnessed:
    module = Witnessed()
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        module.net = nn.Sequential(
            nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 1), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3),
        )  # fmt: skip
    return module


TOWARDS = StrongSampled(StrongSimulation(steps=6, dt=0.01, tau_ratio=0.05, apical_tau=0.1, sigma=0.15))
STRONG = {
    "rule": StrongDFC(StrongSimulation(steps=8, dt=0.01, tau_ratio=0.05, sigma=0.1, tau_noise=0.1)),
    "feedback": FeedbackLearning(method=TOWARDS, initial_passes=1, passes_per_epoch=1, clip_norm=0.3, clip_each=True),
}

CASES: dict[str, tuple[Callable[[], Witnessed], dict[str, Any]]] = {
    "direct": (Witnessed, {"rule": Hebbian()}),
    "direct, in convolutions": (convolutions, {"rule": Hebbian(), "feedback": QUICK}),
    "direct, with feedback learning": (Witnessed, {"rule": Hebbian(), "feedback": PASSES}),
    "layerwise": (Witnessed, {"rule": Mirrored()}),
    "layerwise, in convolutions": (convolutions, {"rule": Mirrored()}),
    "strong, with noise": (Witnessed, STRONG),
    "strong, with noise, in convolutions": (convolutions, STRONG),
}


def fitted(name: str, processes: int, at_call: Any = None, **settings: Any) -> tuple[L.Trainer, Witnessed]:
    make, case = CASES[name]
    module = make()
    module.at_call = at_call or module.at_call
    return fit({"precision": "64-true", **case}, processes, module=module, **settings)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return trained_on_two(fitted, CASES, tmp_path_factory.mktemp("two"))


@pytest.mark.processes
@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one_on_the_joint_batch(name, two):
    worst, apart = furthest(fitted, name, two)
    assert apart <= 1e-10, worst


@pytest.mark.parametrize("name", CASES)
def test_a_run_resumes_bit_for_bit(name, tmp_path):
    call = 7 if "feedback" not in CASES[name][1] or CASES[name][1]["feedback"] is QUICK else 3 * 5 + 7
    with pytest.raises(Interrupt):
        fitted(name, 1, raise_at(call), callbacks=[saver(tmp_path)], enable_checkpointing=True)
    saved = torch.load(tmp_path / "interrupted.ckpt", weights_only=True)["dfc_lightning"]
    assert saved["learner"]["steps"] > 0 and saved["learner"]["optimizer"]["state"]
    resumed = learned(*fitted(name, 1, ckpt_path=tmp_path / "interrupted.ckpt"))
    assert not differing(resumed, learned(*fitted(name, 1)))
