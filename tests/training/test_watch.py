"""The watch on learning: it names what fails, once, and is silent where learning goes well."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dfc_lightning import (
    DFC,
    Backprop,
    ControlError,
    ControlledNetwork,
    DFCStrategy,
    FeedbackLearning,
    LayeredDFC,
    MinimumNorm,
    PIController,
    Update,
)
from dfc_lightning.settling import Euler, Linearized
from dfc_lightning.training.health import alignment
from dfc_lightning.training.watch import EVERY, LearningWatch

SAID = "said once a run"
PLUS_MINUS = torch.tensor([1.0, -1.0])


def lesson(residual: float = 0.0, control: float = 1.0, driven: float = 1.0, size: float = 1.0) -> Any:
    """A step of 8 samples with the target (−1, 0) · λ, each as told, and an update ``size`` times backprop's."""
    grad = torch.tensor([[1.0, 0.0]]).repeat(8, 1)
    settled = SimpleNamespace(
        control=-control * 0.1 * grad,
        residual=torch.full((8,), residual),
        converged=torch.full((8,), residual <= 1e-5),
        counted=lambda drop_unconverged: torch.full((8,), residual <= 10.0),
        response=SimpleNamespace(driven=[torch.zeros(8, 3), -driven * 0.1 * grad]),
    )
    sizes = (size * torch.ones(2), torch.ones(2))
    forward = SimpleNamespace(outputs_at=[1])
    return SimpleNamespace(settled=settled, loss_grad=grad, forward=forward, rule=DFC(), sizes=sizes)


FAILING: dict[str, tuple[dict[str, float], str]] = {
    "unsettled": ({"residual": 0.8}, "100% of the samples do not settle.*target_stepsize"),
    "diverged": ({"residual": 99.0}, "100% of the samples diverge.*Condition 3.*learning rate"),
    "reversed": ({"control": -1.0}, "100% of the samples the control points away.*Condition 3"),
    "overdriven": ({"driven": 30.0}, "30 times as large.*nearly singular.*PIController"),
    "large": ({"size": 300.0}, "300 times as large as backprop's.*Divide it"),
    "small": ({"size": 0.002}, "500 times smaller than backprop's.*Multiply it"),
}


@pytest.mark.parametrize("name", FAILING)
def test_what_fails_is_named_once_with_its_cause_and_remedy(name):
    told, sentence = FAILING[name]
    watch = LearningWatch(stop=False, reduce=lambda t: t)
    with pytest.warns(UserWarning, match=f"(?s){sentence}") as seen:
        for _ in range(8 * EVERY):
            watch.step(lesson(**told), torch.tensor(1.0), [])
    own = [str(w.message) for w in seen if SAID in str(w.message)]
    assert len(own) == 1
    with pytest.raises(ControlError, match=f"(?s){sentence}"):
        watch = LearningWatch(stop=True, reduce=lambda t: t)
        for _ in range(8 * EVERY):
            watch.step(lesson(**told), None, [])


@pytest.mark.parametrize(
    ("told", "losses", "feedback"),
    [
        ({}, lambda k: 2.0, lambda k: 1.0),
        ({"residual": 0.1}, lambda k: 2.0 * 0.99**k, lambda k: 1 + k / 50),
        ({"driven": 3.0, "size": 0.2}, lambda k: 2.0 if k % 97 else 40.0, lambda k: 1.0),
        ({}, lambda k: 0.01 if 100 < k < 300 else 2.0, lambda k: 1.0),
        ({}, lambda k: -float(k), lambda k: 1.0),
    ],
    ids=["level", "slow", "spikes", "up to where it began", "below zero"],
)
def test_what_is_only_unlovely_is_not_spoken_of(told, losses, feedback):
    watch = LearningWatch(stop=True, reduce=lambda t: t)
    for k in range(20 * EVERY):
        watch.step(lesson(**told), torch.tensor(losses(k)), [torch.tensor([feedback(k)])])


@pytest.mark.parametrize(
    ("worst", "said"),
    [(float("nan"), "loss is nan.*the data first"), (float("inf"), "loss is inf"), (50.0, "The loss rises: 50")],
)
def test_a_loss_that_rises_or_is_no_number_is_named(worst, said):
    watch = LearningWatch(stop=True, reduce=lambda t: t)
    with pytest.raises(ControlError, match=said):
        for k in range(10 * EVERY):
            watch.step(lesson(), torch.tensor(1.0 if k < 3 * EVERY else worst), [])


def test_feedback_that_grows_without_bound_is_named():
    watch = LearningWatch(stop=True, reduce=lambda t: t)
    with pytest.raises(ControlError, match="(?s)feedback weights have grown.*weight_decay"):
        for k in range(10 * EVERY):
            watch.step(lesson(), torch.tensor(1.0), [torch.tensor([1.1**k])])


def test_feedback_that_lags_is_named():
    watch = LearningWatch(stop=True, reduce=lambda t: t)
    with pytest.raises(ControlError, match="(?s)feedback lags behind.*follows by 0.1.*FeedbackLearning"):
        for k in range(10 * EVERY):
            watch.step(lesson(), torch.tensor(1.0), [], torch.tensor(0.5 if k < 4 * EVERY else 0.1))


def test_layerwise_feedback_follows_by_the_cosine_between_it_and_the_weights():
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    forward = ControlledNetwork(net).observe(torch.randn(9, 6))
    w = [each.weight.detach() for each in net if isinstance(each, nn.Linear)]
    b = [torch.zeros(0), *map(torch.randn_like, w[1:])]
    both = [torch.cat([each.flatten() for each in several[1:]]) for several in (w, b)]
    angles = {0: b, 1: w, 2: [-each for each in w]}
    found = [alignment(forward.with_feedback(each, layered=True)) for each in angles.values()]
    torch.testing.assert_close(
        torch.stack(found).float(), torch.stack([F.cosine_similarity(*both, dim=0), *PLUS_MINUS])
    )


def test_direct_feedback_follows_by_its_share_in_the_rows_of_the_jacobian_beyond_chance():
    net = nn.Sequential(nn.Linear(6, 12, bias=False), nn.Linear(12, 4))
    forward = ControlledNetwork(net).observe(torch.randn(9, 6))
    rows = [net[1].weight.detach().T, torch.eye(4)]  # J_iᵀ of a linear network
    _, _, basis = torch.linalg.svd(torch.cat(rows).T)
    beside = basis[4:8].T.split([12, 4])
    chance = (4 / 16) ** 0.5
    found = [alignment(forward.with_feedback(q)) for q in (rows, beside)]
    torch.testing.assert_close(
        torch.stack(found).float(), torch.tensor([1.0, -chance / (1 - chance)]), atol=1e-5, rtol=0
    )
    chances = [alignment(forward.with_feedback([torch.randn(12, 4), torch.randn(4, 4)])) for _ in range(200)]
    assert abs(torch.stack(chances).mean()) < 0.05


class Fitted(L.LightningModule):
    """A net of 8-16-3 that learns a linear teacher's classes; ``spoil`` is called after every batch."""

    def __init__(
        self, spoil: Callable[[Any], None] = lambda strategy: None, lr: float = 1e-2, optimizer: Any = torch.optim.SGD
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
        self.spoil, self.lr, self.optimizer = spoil, lr, optimizer

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters(), self.lr)

    def on_train_batch_end(self, *args: Any) -> None:
        self.spoil(self.trainer.strategy)


NO_LEARNING = FeedbackLearning(initial_passes=0, passes_per_epoch=0)


def fit(module: L.LightningModule, steps: int = 5 * EVERY, **arguments: Any) -> list[str]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(320, 8, generator=g)
    y = (x @ torch.randn(8, 3, generator=g)).argmax(1)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", enable_model_summary=False, strategy=DFCStrategy(**arguments), **quiet
    )
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader(TensorDataset(x, y), 16))
    return [text for w in seen if SAID in (text := str(w.message))]


def turned_round(strategy: Any) -> None:
    for q in strategy.network.feedback:
        q.data = -q.data.abs() if q.shape[0] != q.shape[1] else -torch.eye(len(q))


@pytest.mark.parametrize("rule", [DFC(), MinimumNorm(), Backprop()], ids=["DFC", "minimum norm", "backprop"])
def test_nothing_is_said_of_a_fit_that_learns(rule):
    assert fit(Fitted(lr=0.1), rule=rule) == []


def test_feedback_against_the_network_is_spoken_of_or_stops_the_fit():
    said = fit(Fitted(turned_round), rule=DFC(), feedback=NO_LEARNING)
    assert not any("lags behind" in text for text in said)  # it is not to follow
    assert any("control points away" in text or "diverge" in text for text in said)
    assert len(said) == len({text[:15] for text in said})
    assert fit(Fitted(turned_round), rule=DFC(), feedback=NO_LEARNING, watch="off") == []
    with pytest.raises(ControlError, match="Condition 3.*watch='stop'"):
        fit(Fitted(turned_round), rule=DFC(), feedback=NO_LEARNING, watch="stop")


def lost(strategy: Any) -> None:
    for q in strategy.network.feedback:
        q.data = torch.randn_like(q)


@pytest.mark.parametrize("rule", [DFC(Linearized()), LayeredDFC()], ids=["direct", "layered"])
def test_feedback_that_does_not_follow_is_spoken_of_where_it_is_to_learn(rule):
    assert any("feedback lags behind" in said for said in fit(Fitted(lost, lr=1e-4), rule=rule))


class Sized(Backprop):
    """Backprop's update, ``size`` times."""

    size = 1.0

    def teach(self, forward: Any, loss_grad: Tensor) -> Update:
        return Update([[self.size * g for g in each] for each in super().teach(forward, loss_grad).gradients])


@pytest.mark.parametrize(("size", "said"), [(1e3, "1e+03 times as large"), (1e-3, "1e+03 times smaller")])
def test_an_update_of_another_size_than_backprops_is_spoken_of_where_the_optimizer_heeds_it(size, said, monkeypatch):
    monkeypatch.setattr(Sized, "size", size)
    (told,) = fit(Fitted(lr=1e-6), rule=Sized())
    assert said in told and "Adam" in told
    assert fit(Fitted(lr=1e-6, optimizer=torch.optim.Adam), rule=Sized()) == []


def test_an_unknown_watch_is_refused():
    with pytest.raises(ValueError, match="watch='loud'.*warn"):
        DFCStrategy(watch="loud")


def test_a_gain_that_no_time_step_can_follow_is_spoken_of():
    rule = DFC(settling=Euler(steps=30), controller=PIController(k_p=1e9))
    assert any("100% of the samples diverge" in said for said in fit(Fitted(), rule=rule))
