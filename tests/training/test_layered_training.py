"""Rules with layerwise feedback, and by labels alone, through the Trainer: they learn, ranks equal one, runs go on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from cases.fits import Innocent, clusters, differing, loader, quiet, saver
from cases.interruptions import Interrupt, raise_at
from cases.processes import Witnessed, fit, furthest, learned, trained_on_two
from torch import nn

from dfc_lightning import (
    DFC,
    ControlError,
    DFCStrategy,
    DirectRandomTargetProjection,
    FeedbackAlignment,
    FeedbackLearning,
    ForwardGradient,
    KolenPollack,
    LayeredDFC,
    SampledMirror,
    SignSymmetry,
    WeightMirror,
)
from dfc_lightning.feedback_learning import MIRRORED

NOISY = replace(WeightMirror.learning, initial_passes=1, max_batches=None)
RULES: dict[str, dict[str, Any]] = {
    "feedback alignment": {"rule": FeedbackAlignment()},
    "uniform signs": {"rule": SignSymmetry()},
    "signs drawn for a batch": {"rule": SignSymmetry("batch_random")},
    "signs drawn once": {"rule": SignSymmetry("fixed_random")},
    "Kolen-Pollack": {"rule": KolenPollack()},
    "weight mirror": {"rule": WeightMirror(), "feedback": NOISY},
    "forward gradient": {"rule": ForwardGradient()},
    "target projection": {"rule": DirectRandomTargetProjection()},
    "layered DFC": {"rule": LayeredDFC()},
    "layered DFC, noisy start": {"rule": LayeredDFC(), "feedback": replace(MIRRORED, method=SampledMirror())},
}


def normalised() -> Witnessed:
    module = Witnessed()
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        module.net = nn.Sequential(
            nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2, padding=1), nn.GroupNorm(2, 4), nn.ReLU(),
            nn.MaxPool2d(2), nn.Conv2d(4, 6, 1), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3),
        )  # fmt: skip
    return module


NETS: dict[str, Callable[[], Witnessed]] = {"dense": Witnessed, "convolutions": normalised}
CASES = [f"{net}, {name}" for net in NETS for name in RULES]


def fitted(case: str, processes: int, at_call: Any = None, **settings: Any) -> tuple[L.Trainer, Witnessed]:
    net, name = case.split(", ", 1)
    module = NETS[net]()
    module.at_call = at_call or module.at_call
    return fit({"precision": "64-true", **RULES[name]}, processes, module=module, **settings)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return trained_on_two(fitted, CASES, tmp_path_factory.mktemp("two"))


@pytest.mark.processes
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one_on_the_joint_batch(case, two):
    worst, apart = furthest(fitted, case, two)
    assert apart <= 1e-9, worst


@pytest.mark.parametrize("case", CASES)
def test_a_run_resumes_bit_for_bit(case, tmp_path):
    name = case.split(", ", 1)[1]
    passes = 5 if "feedback" in RULES[name] or name.startswith("layered") else 0
    with pytest.raises(Interrupt):
        fitted(case, 1, raise_at(passes + 7), callbacks=[saver(tmp_path)], enable_checkpointing=True)
    saved = torch.load(tmp_path / "interrupted.ckpt", weights_only=True)["dfc_lightning"]
    tracks = name == "Kolen-Pollack" or name.startswith("layered")
    assert (saved["tracking"] is not None) == tracks
    assert not tracks or any(moments["exp_avg"].any() for moments in saved["tracking"][0]["state"].values())
    resumed = learned(*fitted(case, 1, ckpt_path=tmp_path / "interrupted.ckpt"))
    assert not differing(resumed, learned(*fitted(case, 1)))


@pytest.mark.parametrize("name", RULES)
def test_it_learns_what_it_has_not_seen(name):
    held, module = clusters(300, seed=1), Innocent()
    case = RULES[name]
    trainer = quiet(DFCStrategy(seed=1, **case), max_epochs=12)
    trainer.fit(module, loader(clusters(240)))
    with torch.no_grad():
        found = (module(held.tensors[0]).argmax(1) == held.tensors[1]).float().mean()
        untrained = (Innocent()(held.tensors[0]).argmax(1) == held.tensors[1]).float().mean()
    assert found > 0.85 and found > untrained + 0.2


@pytest.mark.parametrize("damage", ["missing", "of another optimizer", "not finite"])
def test_a_damaged_state_of_what_tracks_is_named(damage, tmp_path):
    with pytest.raises(Interrupt):
        fitted("dense, Kolen-Pollack", 1, raise_at(7), callbacks=[saver(tmp_path)], enable_checkpointing=True)
    path = tmp_path / "interrupted.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    tracking = checkpoint["dfc_lightning"]["tracking"]
    if damage == "missing":
        tracking.clear()
    elif damage == "not finite":
        next(iter(tracking[0]["state"].values()))["exp_avg"].fill_(float("nan"))
    else:
        tracking[0]["state"] = {k: {"step": torch.tensor(1.0)} for k in tracking[0]["state"]}
    torch.save(checkpoint, path)
    with pytest.raises(ControlError, match="dfc_lightning.*tracking"):
        fitted("dense, Kolen-Pollack", 1, ckpt_path=path)


def test_a_run_by_backprop_goes_on_by_tracking(tmp_path):
    """The optimizer's moments are the feedback weights' too: from a copy of the weights they stay the same."""
    first = quiet("auto", max_epochs=1, enable_checkpointing=True, callbacks=[saver(tmp_path)])
    module = Innocent()
    module.at_call = raise_at(3)
    with pytest.raises(Interrupt):
        first.fit(module, loader())
    s = DFCStrategy(LayeredDFC(), replace(MIRRORED, lr=1.0), seed=1)
    quiet(s, max_epochs=2).fit(module := Innocent(), loader(), ckpt_path=tmp_path / "interrupted.ckpt")
    for b, point, carries in zip(s.network.feedback, s.network.points, s.network.weights.carrying):
        assert not carries or torch.allclose(b, point.weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "settings", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.05}, {"precision": "bf16-mixed"}]
)
def test_feedback_weights_follow_through_what_the_trainer_does_to_gradients(settings):
    s = DFCStrategy(KolenPollack(0.0), seed=1)
    before: list[torch.Tensor] = []

    class Start(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, *args: Any) -> None:
            if not before:
                network = trainer.strategy.network
                before.extend((b - p.weight).detach().clone() for b, p in zip(network.feedback, network.points))

    quiet(s, callbacks=[Start()], **settings).fit(Innocent(), loader())
    for apart, b, point, carries in zip(before, s.network.feedback, s.network.points, s.network.weights.carrying):
        assert not carries or torch.allclose(b - point.weight, apart, rtol=1e-4, atol=1e-5)


def test_frozen_layers_are_not_followed_until_they_learn():
    class Thawing(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            module.net[2].requires_grad_(trainer.current_epoch > 0)

    s, module = DFCStrategy(KolenPollack(0.0), seed=1), Innocent()
    quiet(s, callbacks=[Thawing()], max_epochs=3).fit(module, loader())
    assert [p.name for p in s.network.points] == ["net.0", "net.2", "net.4"]
    assert all(b.isfinite().all() for b in s.network.feedback)
    x, y = clusters().tensors
    assert F.cross_entropy(module(x), y) < F.cross_entropy(Innocent()(x), y)


def test_mirrors_and_noise_are_told_apart():
    for rule in (LayeredDFC(), WeightMirror()):
        with pytest.raises(ValueError, match=r"feedback\.method=Expected.*B_i.*ExpectedMirror"):
            DFCStrategy(rule, FeedbackLearning())
    with pytest.raises(ValueError, match=r"feedback\.method=ExpectedMirror.*Q_i.*Expected"):
        DFCStrategy(DFC(), MIRRORED)


def test_a_rule_that_does_not_track_goes_on_from_a_run_of_one_that_does(tmp_path):
    with pytest.raises(Interrupt):
        fitted("dense, Kolen-Pollack", 1, raise_at(7), callbacks=[saver(tmp_path)], enable_checkpointing=True)
    s = DFCStrategy(FeedbackAlignment(), seed=1)
    quiet(s, max_epochs=2, precision="64-true").fit(Witnessed(), loader(), ckpt_path=tmp_path / "interrupted.ckpt")
    assert s.tracking is None
