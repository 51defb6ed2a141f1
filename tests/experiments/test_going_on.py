"""A run that was stopped goes on: in its folder, with its curves and its best epoch, from where it was."""

import csv
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from cases.paths import RECIPES

pytest.importorskip("jsonargparse")

from dfc_lightning import FeedbackLearner, cli
from dfc_lightning.data import Digits
from dfc_lightning.models import Classifier

pytestmark = pytest.mark.filterwarnings(
    "ignore:(?s).*was deprecated in v4", "ignore:skip_none parameter", "ignore:(?s).*JsonargparseDeprecationWarning"
)
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
SHORT = [*QUIET, "--trainer.limit_train_batches=8", "--trainer.num_sanity_val_steps=0", "--trainer.log_every_n_steps=1"]
EVERY_BATCH = "--trainer.strategy.init_args.rule=DFC"  # a step of feedback learning after each
RUN = Path("runs/digits/dfc/version_0")
LAST = RUN / "checkpoints" / "last.ckpt"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dfc"])


def fit(*options, recipe="dfc"):
    cli.main(["fit", f"--config={RECIPES / 'digits' / recipe}.yaml", *SHORT, *options])


def stopped(monkeypatch, at, error=KeyboardInterrupt, where=FeedbackLearner):
    """Break off by ``error`` at the given feedback step, or epoch."""
    step, taken = FeedbackLearner.step, []

    def act(self, *args, **kwargs):
        taken.append(1)
        if len(taken) == at:
            if isinstance(error, int):
                os.kill(os.getpid(), error)
            else:
                raise error
        return step(self, *args, **kwargs)

    monkeypatch.setattr(FeedbackLearner, "step", act)


def ended(capsys, words):
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    said = capsys.readouterr()
    return left.value.code, said.err, said.out


def broken_off(capsys, monkeypatch, at, error, *options):
    with monkeypatch.context() as patch:
        stopped(patch, at, error)
        return ended(capsys, ["fit", f"--config={RECIPES / 'digits' / 'dfc.yaml'}", *SHORT, EVERY_BATCH, *options])


def column(name, run=RUN):
    with (run / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def versions():
    return sorted(path.name for path in Path("runs/digits/dfc").iterdir())


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (signal.SIGTERM, 143)])
def test_a_run_stopped_within_the_initial_passes_says_what_goes_on_and_goes_on_there(capsys, monkeypatch, error, code):
    found, said, _ = broken_off(capsys, monkeypatch, 5, error, "--trainer.max_epochs=1")
    assert found == code and f"To go on from there: dfc resume {RUN}" in said
    learner = torch.load(LAST, weights_only=True)["dfc_lightning"]["learner"]
    assert learner["steps"] == (4 if error is KeyboardInterrupt else 5)
    cli.main(["resume", str(RUN)])
    assert versions() == ["version_0"]
    steps = column("feedback/step")
    assert steps == sorted(set(steps)) == list(range(1, 17))  # 8 of the initial pass, one after each batch
    assert "ckpt_path: null" in (RUN / "config.yaml").read_text()


@pytest.fixture
def getting_worse(monkeypatch):
    """A function after which validation finds every label wrong."""

    def act():
        loader = Digits.val_dataloader

        def wrong(self):
            self.val_set.targets.add_(1).remainder_(10)
            return loader(self)

        monkeypatch.setattr(Digits, "val_dataloader", wrong)

    return act


def test_the_best_epoch_before_the_stop_stays_the_best(capsys, getting_worse):
    fit("--trainer.max_epochs=2")
    before = capsys.readouterr().out.splitlines()[-1]
    getting_worse()
    cli.main(["resume", str(RUN), "--trainer.max_epochs=4"])
    after = capsys.readouterr().out.splitlines()[-1]
    cli.main(["resume", str(RUN), "--trainer.max_epochs=5"])
    errors = column("val/error")
    assert len(errors) == 5 and min(errors[2:]) > min(errors[:2])
    assert after == before == capsys.readouterr().out.splitlines()[-1]
    assert versions() == ["version_0"] and len(column("test/error")) == 1


@pytest.mark.slow
def test_last_is_the_newest_run_of_the_recipe_and_goes_on_there():
    fit("--trainer.max_epochs=1")
    fit("--trainer.max_epochs=1")
    os.utime(LAST)  # the first was written to last
    fit("--trainer.max_epochs=2", "--ckpt_path=last")
    assert versions() == ["version_0", "version_1"]
    assert len(column("val/error")) == 2 and len(column("val/error", RUN.with_name("version_1"))) == 1


def test_last_and_best_are_errors_where_there_is_none(capsys):
    for command, name in (("fit", "last"), ("test", "last"), ("test", "best")):
        words = [command, f"--config={RECIPES / 'digits' / 'dfc.yaml'}", *QUIET, f"--ckpt_path={name}"]
        code, _, _ = ended(capsys, words)
        assert re.match(rf"error: --ckpt_path={name}: no run in runs/digits/dfc has", code)


@pytest.mark.slow
def test_best_is_that_of_the_newest_run(capsys):
    fit("--trainer.max_epochs=2")
    told = float(capsys.readouterr().out.splitlines()[-1].split()[1])
    cli.main(["test", f"--config={RECIPES / 'digits' / 'dfc.yaml'}", *QUIET, "--ckpt_path=best"])
    found = re.search(r"test/error\s+│?\s*([\d.]+)", capsys.readouterr().out)
    assert float(found[1]) == pytest.approx(told, rel=1e-3)


@pytest.mark.slow
def test_a_run_that_was_moved_goes_on_where_it_lies(capsys, monkeypatch, tmp_path, getting_worse):
    fit("--trainer.max_epochs=2")
    before = capsys.readouterr().out.splitlines()[-1]
    shutil.move("runs/digits/dfc/version_0", tmp_path / "kept")
    shutil.rmtree("runs")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    getting_worse()
    cli.main(["resume", "../kept", "--trainer.max_epochs=3"])
    assert capsys.readouterr().out.splitlines()[-1] == before
    assert len(column("val/error", tmp_path / "kept")) == 3 and not (tmp_path / "elsewhere" / "runs").exists()


@pytest.mark.slow
def test_another_recipe_begins_a_run_of_its_own_from_the_checkpoint():
    fit("--trainer.max_epochs=1")
    fit("--trainer.max_epochs=2", f"--ckpt_path={LAST}", "--trainer.logger.init_args.name=mine")
    assert len(column("val/error")) == 1 and len(column("val/error", Path("runs/mine/version_0"))) == 1


def test_the_state_at_an_error_is_kept_beside_the_last_good_one(monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        stopped(patch, 8 + 8 + 3, ZeroDivisionError)
        fit("--trainer.max_epochs=2", EVERY_BATCH)
    last, at = (torch.load(LAST.with_name(name), weights_only=True) for name in ("last.ckpt", "on_exception.ckpt"))
    assert (last["global_step"], at["global_step"]) == (8, 11)
    cli.main(["resume", str(LAST.with_name("on_exception.ckpt"))])
    assert column("feedback/step") == list(range(1, 25))


@pytest.mark.slow
def test_a_validation_that_was_broken_off_is_run_whole(capsys, monkeypatch):
    options = ["--trainer.max_epochs=2", "--data.init_args.eval_batch_size=50"]
    fit(*options)
    step, taken = Classifier.validation_step, []

    def broken(self, batch, batch_idx):
        taken.append(1)
        if len(taken) == 9:  # of 6 an epoch
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "validation_step", broken)
        ended(capsys, ["fit", f"--config={RECIPES / 'digits' / 'dfc.yaml'}", *SHORT, *options])
    cli.main(["resume", str(RUN.with_name("version_1"))])
    assert column("val/error", RUN.with_name("version_1")) == column("val/error")


@pytest.mark.slow
def test_what_cannot_go_on_is_named(capsys):
    Path("empty").mkdir()
    code, _, _ = ended(capsys, ["resume", "empty"])
    assert code.startswith("error: empty has no checkpoints/last.ckpt to go on from")
    fit("--trainer.max_epochs=1", recipe="bp")
    (config,) = Path("runs").rglob("config.yaml")
    assert yaml.safe_load(config.read_text())["trainer"]["max_epochs"] == 1
    config.unlink()
    code, _, _ = ended(capsys, ["resume", "runs/digits/bp"])
    assert "has no config.yaml" in code


def test_a_run_refused_before_training_leaves_no_checkpoint(monkeypatch, capsys):
    monkeypatch.setattr(Digits, "train_dataloader", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit("--trainer.max_epochs=1")
    assert not list(Path(".").rglob("*.ckpt"))
