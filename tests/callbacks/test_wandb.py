"""Runs tracked in Weights & Biases, read back from what its own client wrote, offline."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.fits import BATCH, BATCHES, LEARNING, Innocent, clusters, loader, quiet, strategy
from cases.paths import RECIPES
from cases.processes import JOINT, fit, spawn
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger

pytest.importorskip("jsonargparse")
pytest.importorskip("wandb")

import wandb

from dfc_lightning import DFC, ControlError
from dfc_lightning.callbacks import WandbTracking, wandb_tracking
from dfc_lightning.cli import main
from dfc_lightning.settling import Linearized

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:(?s).*was deprecated in v4", "ignore:skip_none parameter", "ignore:(?s).*JsonargparseDeprecationWarning"
    ),
]
RULE = "--trainer.strategy.init_args.rule=dfc_lightning.DFC"
FIT = ["fit", f"--config={RECIPES}/digits/dfc.yaml", RULE, f"--config={RECIPES}/trackers/wandb.yaml"]
OPTIONS = ["accelerator=cpu", "enable_progress_bar=false", "enable_model_summary=false", "num_sanity_val_steps=0"]
FIT += [f"--trainer.{option}" for option in OPTIONS]
HISTOGRAMS = "--trainer.callbacks.init_args.histograms_every_n_steps"
EPOCH = 40  # batches of the digits


class Tracked:
    """What the client wrote about a run, in its file of records: a LevelDB log of protocol buffers.

    Args:
        folder: one of those the client makes for a run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.id = folder, ""
        self.rows: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.axes: dict[str, str] = {}
        self.exit_code: int | None = None
        for record in _records(next(folder.glob("run-*.wandb"))):
            self.id = record.run.run_id or self.id
            if record.HasField("history"):
                self.rows.append(_decoded(record.history.item))
            self.config |= _decoded(record.config.update)
            self.summary |= _decoded(record.summary.update)
            if record.HasField("metric") and record.metric.name:
                self.axes[record.metric.name] = record.metric.step_metric
            if record.HasField("exit"):
                self.exit_code = record.exit.exit_code

    def __getitem__(self, name: str) -> list[Any]:
        """The values of a metric, in the order they were logged in."""
        return [row[name] for row in self.rows if name in row]


def _records(path: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # no header fits in the rest of a block
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # full, or last part
            yield Record.FromString(whole)
            whole = b""


def _decoded(items: Any) -> dict[str, Any]:
    decoded: dict[str, Any] = {}
    for item in items:
        *outer, last = item.nested_key or [item.key]
        inner = decoded
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = json.loads(item.value_json)
    return decoded


def tracked(folder: Path) -> list[Tracked]:
    """The runs tracked under a folder, by the time of their start."""
    finish()
    return [Tracked(run) for run in sorted(folder.glob("wandb/offline-run-*"), key=os.path.getctime)]


def finish() -> None:
    wandb.finish()
    wandb.teardown()  # only then are the files whole


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    isolated(tmp_path, monkeypatch)
    yield
    finish()


def isolated(folder, monkeypatch, **environment):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["dfc"])
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    account = {"WANDB_CONFIG_DIR": str(folder / "config"), "NETRC": str(folder / "netrc")}
    defaults = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off", **account}
    for name, value in (defaults | environment).items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The digits for two epochs, then resumed for a third: both as tracked, and what was printed."""
    folder = tmp_path_factory.mktemp("recipe")
    with pytest.MonkeyPatch.context() as patch:
        isolated(folder, patch)
        main([*FIT, "--trainer.max_epochs=2", f"{HISTOGRAMS}={EPOCH}"])
        finish()
        last = folder / "runs/digits/dfc/version_0/checkpoints/last.ckpt"
        main([*FIT, "--trainer.max_epochs=3", f"--ckpt_path={last}"])
        return tracked(folder / "runs")


def test_metrics_are_on_the_axes_they_belong_to(recipe):
    run, _ = recipe
    assert run.exit_code == 0 and len(run["train/loss"]) == 2 and run["train/loss"][1] < run["train/loss"][0]
    assert run["feedback/step"] == list(range(10, 3 * EPOCH + 1, 10))
    at = [row["trainer/global_step"] for row in run.rows if "feedback/step" in row]
    assert at == [max(0, step - EPOCH) for step in run["feedback/step"]]  # a pass before training, then one a batch
    of_feedback = {name for row in run.rows for name in row if name.startswith("feedback/")} - {"feedback/step"}
    assert of_feedback and {run.axes[name] for name in of_feedback} == {"feedback/step"}
    assert "feedback/step" in run.axes and "train/loss" not in run.axes


def test_a_recipe_is_the_configuration(recipe):
    config = recipe[0].config
    strategy = config["strategy"]
    assert strategy["class"] == "DFCStrategy" and strategy["rule"]["class"] == "DFC"
    assert strategy["rule"]["settling"]["class"] == "SteadyState" and strategy["rule"]["controller"]["k_p"] == 0.0
    assert strategy["feedback"]["method"]["class"] == "Expected" and strategy["feedback"]["lr"] == 3e-3
    assert strategy["seed"] == config["seed_everything"] == 0 and strategy["widths"] == [64, 64, 10]
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 2e-3
    assert config["data"]["class_path"] == "dfc_lightning.data.Digits"
    assert config["trainer"]["max_epochs"] == 2


def test_the_summary_has_the_best_epoch_and_its_test(recipe):
    first, resumed = recipe
    for run, errors in ((first, first["val/error"]), (resumed, first["val/error"] + resumed["val/error"])):
        best = min(errors)
        assert (run.summary["best/val/error"], run.summary["best/epoch"]) == (best, errors.index(best))
    assert first.summary["best/test/error"] == first["test/error"][-1]


def test_histograms_are_of_weights_and_feedback_weights(recipe):
    run, resumed = recipe
    layers = sorted({name[2:] for row in run.rows for name in row if name.startswith("Q/")})
    assert len(layers) == 3 and not any(name.startswith(("Q/", "W/")) for row in resumed.rows for name in row)
    for layer, size in zip(layers, (64 * 64, 64 * 64, 64 * 10)):
        assert [sum(histogram["values"]) for histogram in run[f"W/{layer}"]] == [size] * 2
        assert [sum(histogram["values"]) for histogram in run[f"Q/{layer}"]] == [10 * size // 64] * 2
    at = [row["trainer/global_step"] for row in run.rows if f"Q/{layers[0]}" in row]
    assert at == [EPOCH, 2 * EPOCH]


def test_the_dashboard_is_drawn_at_the_end(recipe):
    for run in recipe:
        (drawn,) = run["dashboard"]
        (path,) = drawn["filenames"]
        assert drawn["format"] == "png" and (run.folder / "files" / path).read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn_does_not_end_the_command(tmp_path):
    trainer = quiet(strategy(), max_epochs=0, logger=CSVLogger(tmp_path), callbacks=[WandbTracking(save_dir=tmp_path)])
    with pytest.warns(UserWarning, match="no dashboard of this run"):
        trainer.fit(Innocent(), loader())
    (run,) = tracked(tmp_path)
    assert not run["dashboard"] and run.exit_code == 0


def test_resuming_goes_on_in_the_same_run(recipe):
    run, resumed = recipe
    assert resumed.id == run.id
    assert resumed["feedback/step"] == list(range(3 * EPOCH + 10, 4 * EPOCH + 1, 10))
    assert resumed["epoch"][0] == 2 and len(resumed["train/loss"]) == 1


def test_testing_a_checkpoint_goes_on_in_its_run_and_makes_no_other(tmp_path):
    kept, first = ModelCheckpoint(tmp_path, monitor="val_accuracy", mode="max"), WandbTracking(save_dir=tmp_path)
    trainer = quiet(strategy(), callbacks=[first, kept], enable_checkpointing=True)
    trainer.fit(WithTest(), loader(), loader(clusters(seed=1)))
    (run,) = tracked(tmp_path)
    assert run.summary["best/val_accuracy"] == max(run["val_accuracy"])
    quiet(callbacks=[WandbTracking(save_dir=tmp_path)]).test(WithTest(), loader())
    assert len(tracked(tmp_path)) == 1
    quiet(callbacks=[WandbTracking(save_dir=tmp_path)]).test(WithTest(), loader(), ckpt_path=kept.best_model_path)
    _, tested = tracked(tmp_path)
    assert tested.id == run.id and tested["samples_tested"] == [BATCHES * BATCH]


class WithTest(Innocent):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("samples_tested", float(len(batch[0])), reduce_fx="sum")


def test_without_a_recipe_the_strategy_is_the_configuration(tmp_path):
    s = strategy(rule=DFC(settling=Linearized(), target_stepsize=0.05))
    quiet(s, max_epochs=1, callbacks=[WandbTracking(save_dir=tmp_path, name="mine")]).fit(Innocent(), loader())
    (run,) = tracked(tmp_path)
    found = run.config["strategy"]
    assert found["rule"]["settling"]["class"] == "Linearized" and found["rule"]["target_stepsize"] == 0.05
    assert found["feedback"]["method"]["steps"] == 4 and found["seed"] == 7
    assert run.config["model"] == {"class": "Innocent"}
    assert run.config["seed"] == 0 and run.config["lr"] == 0.01  # the module's hyperparameters
    assert len(run["loss"]) == 1 and not any(name.startswith("best/") for name in run.summary)


def test_histograms_of_accumulated_batches_are_drawn_once_a_step(tmp_path):
    tracking = WandbTracking(1, save_dir=tmp_path)
    quiet(strategy(), max_epochs=2, callbacks=[tracking], accumulate_grad_batches=3).fit(Innocent(), loader())
    (run,) = tracked(tmp_path)
    assert [row["trainer/global_step"] for row in run.rows if "Q/net/0" in row] == [1, 2, 3, 4]


def test_backprop_is_tracked_too(tmp_path):
    quiet(max_epochs=1, callbacks=[WandbTracking(BATCHES, save_dir=tmp_path)]).fit(Innocent(), loader())
    (run,) = tracked(tmp_path)
    assert run.config["strategy"]["rule"] == {"class": "Backprop"} and len(run["W/net/4"]) == 1 and not run["Q/net/4"]


def test_the_summary_is_of_the_best_epoch_and_of_tests_of_no_other(tmp_path):
    kept = ModelCheckpoint(tmp_path, "{epoch}", monitor="val", save_top_k=-1)
    trainer = quiet(
        strategy(), max_epochs=5, callbacks=[WandbTracking(save_dir=tmp_path), kept], enable_checkpointing=True
    )
    module = Losing([math.nan, 2.0, 1.0, math.nan, 3.0])
    trainer.fit(module, loader(), loader())
    trainer.validate(module, loader(), verbose=False)
    for epoch in (2, 1, 4):  # at epoch 1 the best there was
        module.test_loss = float(epoch)
        trainer.test(module, loader(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt", verbose=False)
    (run,) = tracked(tmp_path)
    assert run["test"] == [2.0, 1.0, 4.0]
    assert {name: run.summary[name] for name in run.summary if name.startswith("best/")} == {
        "best/val": 1.0,
        "best/epoch": 2,
        "best/test": 2.0,
    }


class Losing(Innocent):
    """Has the validation losses it is given, an epoch each, and then one better than all."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.losses, self.test_loss = losses, 0.0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", [*self.losses, 0.5][self.current_epoch])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test", self.test_loss)


@pytest.mark.processes
def test_two_processes_make_one_run(tmp_path):
    spawn(on_two, 2, tmp_path)
    (run,) = tracked(tmp_path)
    assert run["feedback/step"] == list(range(1, 7)) and run.exit_code == 0
    assert len(run["settling/converged"]) == 3 and len(run["Q/net/0"]) == 1


def on_two(rank: int, processes: int, folder: str) -> None:
    tracking = WandbTracking(2, save_dir=folder, mode="offline")  # the environment is that of the first test to spawn
    case = {"precision": "32-true", "feedback": LEARNING, "size": 3 * JOINT}
    fit(case, processes, callbacks=[tracking], max_epochs=1)
    wandb.finish()


def test_disabled_makes_no_run_and_keeps_none(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracking = WandbTracking(2, save_dir=tmp_path)
    trainer = quiet(strategy(), max_epochs=1, logger=CSVLogger(tmp_path), callbacks=[tracking])
    trainer.fit(Innocent(), loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert trainer.global_step == BATCHES and not list(tmp_path.glob("**/*run-*"))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["callbacks"]["WandbTracking"] == {"id": None, "best": None}


def test_without_an_account_nothing_is_trained(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    ended = subprocess.run(
        [sys.executable, "-m", "dfc_lightning", *FIT], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error")]
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert all(way in line for way in ("WANDB_API_KEY", "`wandb login`", "WANDB_MODE=offline"))
    assert not list(tmp_path.glob("**/*.ckpt")) and not list(tmp_path.glob("**/metrics.csv"))


def test_without_the_package_nothing_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wandb_tracking, "RequirementCache", lambda requirement: False)
    with pytest.raises(SystemExit) as ended:
        main(FIT)
    assert ended.value.code == 2 and 'pip install "dfc_lightning[recipes]"' in capsys.readouterr().err
    assert not list(tmp_path.glob("**/*.ckpt"))


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match="histograms_every_n_steps=-1"):
        WandbTracking(-1)
    logger = WandbLogger(save_dir=tmp_path)
    with pytest.raises(ControlError, match="Give the arguments of that to WandbTracking"):
        quiet(strategy(), logger=logger, callbacks=[WandbTracking()]).fit(Innocent(), loader())
