"""Every rule through the Trainer: it learns, ranks equal one, runs go on, and bfloat16 points the same way."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from cases.fits import LEARNING, Innocent, clusters, differing, loader, quiet, saver
from cases.interruptions import Interrupt, raise_at
from cases.processes import Witnessed, fit, furthest, learned, trained_on_two
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from dfc_lightning import (
    DFC,
    Backprop,
    ControlError,
    ControlledNetwork,
    DFCStrategy,
    DifferenceTargetPropagation,
    DirectRandomTargetProjection,
    DualPropagation,
    FeedbackAlignment,
    FeedbackLearning,
    ForwardGradient,
    KolenPollack,
    LayeredDFC,
    LeastControl,
    LinkedLoss,
    PredictiveCoding,
    SampledMirror,
    SignSymmetry,
    WeightMirror,
)
from dfc_lightning.callbacks import AlignmentMonitor
from dfc_lightning.feedback_learning import MIRRORED
from dfc_lightning.settling import Descent

NOISY = replace(WeightMirror.learning, initial_passes=1, max_batches=None)
RULES: dict[str, dict[str, Any]] = {
    "feedback alignment": {"rule": FeedbackAlignment()},
    "uniform signs": {"rule": SignSymmetry()},
    "signs drawn for a batch": {"rule": SignSymmetry("batch_random")},
    "signs drawn once": {"rule": SignSymmetry("fixed_random")},
    "Kolen-Pollack": {"rule": KolenPollack()},
    "weight mirror": {"rule": WeightMirror(), "feedback": NOISY},
    "difference targets": {
        "rule": DifferenceTargetPropagation(),
        "feedback": replace(DifferenceTargetPropagation.learning, max_batches=None),
    },
    "forward gradient": {"rule": ForwardGradient()},
    "target projection": {"rule": DirectRandomTargetProjection()},
    "layered DFC": {"rule": LayeredDFC()},
    "least control": {"rule": LeastControl(alpha=1.0)},
    "least control, Kolen-Pollack": {"rule": LeastControl("kolen_pollack")},
    "least control, learned": {"rule": LeastControl("learned"), "feedback": LEARNING},
    "predictive coding": {"rule": PredictiveCoding(nudge=1.0)},
    "predictive coding, centred steps": {"rule": PredictiveCoding(Descent(4, 0.3), centred=True)},
    "dual propagation": {"rule": DualPropagation()},
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
LEARNS = {"Kolen-Pollack", "mirror", "layered", "learned", "targets"}
"""Words in the names of rules whose feedback weights are part of a run."""
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


@pytest.mark.parametrize("case", [c for c in CASES if c.startswith("dense") or LEARNS & set(c.split())])
def test_a_run_resumes_bit_for_bit(case, tmp_path):
    name = case.split(", ", 1)[1]
    passes = 5 if "feedback" in RULES[name] or name in ("layered DFC", "least control, Kolen-Pollack") else 0
    with pytest.raises(Interrupt):
        fitted(case, 1, raise_at(passes + 7), callbacks=[saver(tmp_path)], enable_checkpointing=True)
    saved = torch.load(tmp_path / "interrupted.ckpt", weights_only=True)["dfc_lightning"]
    tracks = "Kolen-Pollack" in name or name.startswith("layered")
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


class Maps(Innocent):
    """A convolution, batch statistics, pooling by maxima and dropout."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2),
                nn.Flatten(), nn.Dropout(0.1), nn.Linear(24, 3),
            )  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_it_trains_convolutions_with_batch_statistics_and_dropout_in_mixed_precision(name):
    module, held = Maps(), clusters(300, seed=1)
    trainer = quiet(DFCStrategy(seed=1, **RULES[name]), max_epochs=7, precision="bf16-mixed")
    trainer.fit(module, loader(clusters(240), 16))
    module.eval()
    with torch.no_grad():
        found = (module(held.tensors[0]).argmax(1) == held.tensors[1]).float().mean()
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in module.parameters())
    assert found > 0.7  # chance is a third


def updated(name: str, dtype: torch.dtype | None) -> tuple[torch.Tensor, torch.Tensor]:
    """What a batch teaches by a rule, the loss in that precision, and what it teaches by backprop."""
    (x, y), found = clusters(64).tensors, []
    for rule in (RULES[name]["rule"], Backprop()):
        module = Maps().net
        network = ControlledNetwork(module, seed=0)
        network.loss = LinkedLoss("softmax")
        torch.manual_seed(3)  # of dropout
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            with network.taught_by(rule) as lesson:
                loss = F.cross_entropy(network(x), y)
                lesson.watch(loss)
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
    return found[0], found[1]


def degrees(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.rad2deg(torch.acos(F.cosine_similarity(a, b, dim=0).clamp(-1, 1))))


@pytest.mark.parametrize("name", RULES)
def test_an_update_under_autocast_points_where_it_would_without_and_is_not_backprops(name):
    half, full = updated(name, torch.bfloat16), updated(name, None)
    assert degrees(half[0], full[0]) < 2
    assert degrees(*full) > (0.02 if name in NEARLY else 2)


@pytest.mark.parametrize("name", RULES)
def test_the_monitor_shows_how_far_it_is_from_backprop(name, tmp_path):
    """By the angle that the two updates of the same batch make, made here by hand."""
    angles: list[float] = []

    class ByHand(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, _: Any) -> None:
            taught = torch.cat([p.grad.flatten() for p in module.parameters()])
            with torch.enable_grad():
                loss = F.cross_entropy(module.net(batch[0]), batch[1])
                slopes = torch.autograd.grad(loss, list(module.parameters()))
            angles.append(degrees(taught, torch.cat([g.flatten() for g in slopes])))

    batch, module = clusters(16).tensors, Innocent()
    logger = CSVLogger(tmp_path)
    quiet(
        DFCStrategy(seed=1, **RULES[name]), logger=logger, callbacks=[ByHand(), AlignmentMonitor(1)], max_epochs=1,
        log_every_n_steps=1,
    ).fit(module, loader(clusters(16), 16))  # fmt: skip
    logger.save()
    with open(f"{logger.log_dir}/metrics.csv") as lines:
        found = [float(row[key]) for row in csv.DictReader(lines) if row.get(key := "alignment/backprop/total")]
    assert found == pytest.approx(angles, abs=0.05)


NEARLY = ("dual propagation", "predictive coding, centred steps")
"""What departs from backprop to second order alone."""


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
