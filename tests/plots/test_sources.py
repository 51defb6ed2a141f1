"""Runs are read alike, whatever has logged them."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dfc_lightning import DFCStrategy
from dfc_lightning.callbacks import AlignmentMonitor
from dfc_lightning.plots import Series, read_run
from dfc_lightning.plots.sources import RunError


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(*loggers):
    L.seed_everything(0, verbose=False)
    data = DataLoader(TensorDataset(torch.randn(24, 4), torch.arange(24) % 3), 4)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        strategy=DFCStrategy(),
        logger=list(loggers),
        callbacks=[AlignmentMonitor(every_n_steps=4)],
        log_every_n_steps=2,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), data)


def test_tensorboards_events_tell_what_a_csv_file_does(tmp_path):
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger

    fit(CSVLogger(tmp_path / "csv", "dfc"), TensorBoardLogger(tmp_path / "events", "dfc"))
    csv, events = (read_run(tmp_path / kind / "dfc") for kind in ("csv", "events"))
    assert (events.name, events.version) == ("dfc", "version_0")
    assert events.steps_per_epoch == csv.steps_per_epoch == 6
    assert {"train/loss", "alignment/backprop/total", "feedback/norm"} <= set(csv.series) <= set(events.series)
    for name, series in csv.series.items():
        assert events.series[name].steps == series.steps, name
        assert events.series[name].values == pytest.approx(series.values, rel=1e-5), name  # kept in float32


def test_events_without_tensorboard_say_what_reads_them(tmp_path, monkeypatch):
    (tmp_path / "events.out.tfevents.1.host.1.0").touch()
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    with pytest.raises(RunError, match="pip install tensorboard"):
        read_run(tmp_path)


def test_a_run_on_a_server_is_read_by_its_path(monkeypatch):
    wandb = pytest.importorskip("wandb")
    rows = [
        {"_step": 0, "_runtime": 1.5, "trainer/global_step": 5, "epoch": 0, "train/loss": 2.0, "note": "text"},
        {"_step": 1, "trainer/global_step": 0, "feedback/step": 3.0, "feedback/norm": 1.5},
        {"_step": 2, "trainer/global_step": 11, "epoch": 1, "train/loss": 1.0},
        {"_step": 3, "best": 1.0},
    ]
    asked = []

    def api():
        return SimpleNamespace(
            run=lambda path: asked.append(path) or SimpleNamespace(name="calm-sea-3", scan_history=lambda: rows)
        )

    monkeypatch.setattr(wandb, "Api", api)
    run = read_run("wandb:me/dfc/1a2b")
    assert (asked, run.name, run.version, run.steps_per_epoch) == (["me/dfc/1a2b"], "calm-sea-3", "1a2b", 6)
    assert run.series == {"train/loss": Series([6.0, 12.0], [2.0, 1.0]), "feedback/norm": Series([3.0], [1.5])}


def test_a_server_that_refuses_is_told_of_with_the_way_in(monkeypatch):
    wandb = pytest.importorskip("wandb")

    def refuse():
        raise wandb.errors.CommError("no such run")

    monkeypatch.setattr(wandb, "Api", refuse)
    with pytest.raises(RunError, match="wandb:me/dfc/1a2b cannot be had: no such run.*wandb login"):
        read_run("wandb:me/dfc/1a2b")
