"""SettlingMonitor and FeedbackMonitor: what they log equals what they are said to log, and they change nothing."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import pytest
import torch
from cases.fits import BATCH, BATCHES, LEARNING, Innocent, loader
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, Logger

from dfc_lightning import DFC, ControlError, DFCStrategy
from dfc_lightning.callbacks import FeedbackMonitor, SettlingMonitor
from dfc_lightning.settling import Euler, Linearized


class Pages(Logger):
    def __init__(self) -> None:
        super().__init__()
        self.pages: dict[int, dict[str, float]] = {}

    name, version = "pages", 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        kept = {k: v for k, v in metrics.items() if k.startswith(("settling/", "feedback_weights/"))}
        if set(kept) - {"settling/converged", "settling/residual", "settling/iterations"}:
            self.pages.setdefault(step or 0, {}).update(kept)


class Lessons(Callback):
    """Notes every settled state, and the feedback weights at every optimizer step."""

    def __init__(self) -> None:
        self.settled: list[Any] = []
        self.feedback: list[list[torch.Tensor]] = []

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        self.settled.append(trainer.strategy.lesson.settled)

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.feedback.append([q.detach().clone() for q in trainer.strategy.network.feedback])


def fit(*callbacks: Callback, rule: DFC | None = None, **settings: Any) -> tuple[Pages, Lessons, torch.Tensor]:
    pages, lessons, module = Pages(), Lessons(), Innocent()
    trainer = L.Trainer(
        accelerator="cpu",
        logger=pages,
        callbacks=[lessons, *callbacks],
        strategy=DFCStrategy(rule or DFC(), LEARNING, seed=0),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 2, **settings},
    )
    trainer.fit(module, loader())
    return pages, lessons, torch.cat([p.detach().flatten() for p in module.parameters()])


def test_the_settling_monitor_tells_the_distribution_over_samples():
    rule = DFC(settling=Euler(steps=30, dt=0.1, tau_ratio=0.2), target_stepsize=0.3)
    pages, lessons, _ = fit(SettlingMonitor(every_n_steps=2), rule=rule)
    assert list(pages.pages) == [2, 4, 6, 8, 10]
    for step, page in pages.pages.items():
        settled = lessons.settled[step - 1]
        residual = settled.residual.double().sort().values
        assert page["settling/residual_max"] == residual[-1]
        assert page["settling/residual_median"] == residual[(BATCH - 1) // 2]
        assert page["settling/unconverged"] == pytest.approx(1 - settled.converged.double().mean().item())
        assert page["settling/diverged"] == 0
        norms = settled.control.double().norm(dim=1) / 0.3
        assert page["settling/control_norm"] == pytest.approx(norms.mean().item(), rel=1e-6)


def test_a_diverged_sample_is_told_and_spoils_no_mean():
    unstable = DFC(settling=Euler(steps=400, dt=0.2, tau_ratio=0.2, apical_tau=0.2), target_stepsize=1e6)
    pages, lessons, _ = fit(SettlingMonitor(1), rule=unstable, max_epochs=1)
    for step, page in pages.pages.items():
        sound = lessons.settled[step - 1].counted(False)
        assert page["settling/diverged"] == pytest.approx(1 - sound.double().mean().item())
        assert math.isfinite(page["settling/control_norm"])


def test_samples_of_accumulated_batches_are_seen_together():
    pages, lessons, _ = fit(SettlingMonitor(1), rule=DFC(settling=Linearized()), accumulate_grad_batches=BATCHES)
    assert list(pages.pages) == [1, 2]
    residuals = torch.cat([s.residual for s in lessons.settled[:BATCHES]])
    assert pages.pages[1]["settling/residual_max"] == residuals.max()


def test_the_feedback_monitor_tells_size_and_turning_of_each_layer():
    pages, lessons, _ = fit(FeedbackMonitor(every_n_steps=5))
    assert list(pages.pages) == [5, 10]
    first, second = lessons.feedback[4], lessons.feedback[9]
    for i, (q, before) in enumerate(zip(second, first), start=1):
        assert pages.pages[10][f"feedback_weights/norm/layer_{i}"] == pytest.approx(q.norm().item(), rel=1e-6)
        cosine = (q * before).sum().double() / (q.double().norm() * before.double().norm())
        angle = math.degrees(math.acos(min(1.0, cosine.item())))
        assert pages.pages[10][f"feedback_weights/turned/layer_{i}"] == pytest.approx(angle, abs=0.02)
        assert angle > 0.01
    assert not any("turned" in name for name in pages.pages[5])


def test_they_change_nothing_and_csv_is_enough(tmp_path):
    _, _, without = fit()
    logger = CSVLogger(tmp_path)
    _, _, with_them = fit(SettlingMonitor(1), FeedbackMonitor(1))
    assert torch.equal(with_them, without)
    L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        strategy=DFCStrategy(),
        logger=logger,
        callbacks=[SettlingMonitor(1), FeedbackMonitor(1)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Innocent(), loader())
    logger.save()
    table = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    assert "settling/residual_max" in table and "feedback_weights/norm/layer_3" in table


@pytest.mark.parametrize("monitor", [SettlingMonitor, FeedbackMonitor])
def test_other_strategies_and_steps_are_refused(monitor):
    with pytest.raises(ValueError, match="every_n_steps=0"):
        monitor(every_n_steps=0)
    trainer = L.Trainer(accelerator="cpu", callbacks=[monitor()], logger=False, enable_checkpointing=False)
    with pytest.raises(ControlError, match=f"{monitor.__name__} looks at the lessons"):
        trainer.fit(Innocent(), loader())
