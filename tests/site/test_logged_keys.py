"""docs/logged.md names every key that is logged, and none that is not."""

from __future__ import annotations

import re
from typing import Any

import lightning as L
import pytest
import torch
from cases.paths import ROOT
from lightning.pytorch.loggers import Logger

from dfc_lightning import DFC, DFCStrategy, LayeredDFC
from dfc_lightning.callbacks import AlignmentMonitor, FeedbackMonitor, SettlingMonitor
from dfc_lightning.data import StudentTeacher
from dfc_lightning.models import MLP, Regressor

SECTIONS = re.split(r"^## ", (ROOT / "docs" / "logged.md").read_text("utf-8"), flags=re.MULTILINE)[1:]
OURS = ("settling/", "feedback/", "feedback_weights/", "alignment/")


class Kept(Logger):
    """Keeps the keys."""

    name = version = "kept"

    def __init__(self) -> None:
        super().__init__()
        self.keys: set[str] = set()

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.keys |= set(metrics)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


def named() -> set[str]:
    """Keys in the first column of the page's tables."""
    rows = [line for section in SECTIONS for line in section.splitlines() if line.startswith("| `")]
    return {key for row in rows for key in re.findall(r"`([^`]+)`", row.split(" | ")[0])}


def as_named(key: str) -> str:
    return re.sub(r"/(layer_\d+|total)$", "/{layer}", key)


@pytest.fixture(scope="module")
def logged() -> set[str]:
    keys: set[str] = set()
    for rule, tau_ratio in ((DFC(), 0.2), (LayeredDFC(), None)):
        torch.manual_seed(0)
        logger = Kept()
        trainer = L.Trainer(
            max_epochs=1,
            limit_train_batches=4,
            log_every_n_steps=1,
            strategy=DFCStrategy(rule),
            callbacks=[AlignmentMonitor(1, tau_ratio=tau_ratio), SettlingMonitor(1), FeedbackMonitor(1)],
            logger=logger,
            accelerator="cpu",
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Regressor(MLP([15, 6, 4])), StudentTeacher(output_size=4, train_size=64, batch_size=16))
        keys |= {key for key in logger.keys if key != "epoch"}
    return keys


def test_every_logged_key_is_named(logged):
    assert {as_named(key) for key in logged} <= named()


def test_every_named_key_of_ours_is_logged(logged):
    assert {key for key in named() if key.startswith(OURS)} <= {as_named(key) for key in logged}
