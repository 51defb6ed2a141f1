"""``dfc reproduce`` and ``dfc report``: no run twice, none lost, and what the page says of them."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cases.paths import RECIPES

pytest.importorskip("jsonargparse")

from filelock import FileLock

from dfc_lightning import cli
from dfc_lightning.experiments.ledger import Ledger
from dfc_lightning.experiments.protocol import reported
from dfc_lightning.experiments.published import Published
from dfc_lightning.experiments.recipe import Recipe
from dfc_lightning.experiments.report import Standing
from dfc_lightning.experiments.runner import Run
from dfc_lightning.experiments.table import Summary, mark

DIGITS = [f"--recipes={RECIPES}", "--column", "digits"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dfc"])


def reproduce(*options, results="results", runs="runs"):
    cli.main(["reproduce", *DIGITS, f"--results={results}", f"--runs={runs}", *options])
    return Ledger(results).read()


def start(*options):
    command = [sys.executable, "-m", "dfc_lightning", "reproduce", *DIGITS, "--runs=runs", *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.processes
def test_a_run_killed_in_the_middle_ends_as_one_that_was_not():
    options = ["--rule", "dfc", "--seeds", "1", "--epochs", "9"]
    killed = start(*options)
    for _ in range(600):
        if any(Path("runs").rglob("last.ckpt")) or killed.poll() is not None:
            break
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, killed.stderr.read()
    (metrics,) = Path("runs").rglob("metrics.csv")
    assert 1 <= len(metrics.read_text().splitlines()) - 1 < 9 and Ledger("results").read() == []
    (resumed,) = reproduce(*options)
    (straight,) = reproduce(*options, results="others", runs="other")
    assert resumed.history == straight.history and resumed.value == straight.value
    assert resumed.epochs == len(resumed.history["test/error"]) == 9


@pytest.mark.processes
def test_two_processes_share_the_runs_and_make_none_twice():
    both = [start("--rule", "bp", "dfa", "--seeds", "2", "--epochs", "2") for _ in range(2)]
    for process in both:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    made = [(result.recipe, result.seed) for result in Ledger("results").read()]
    assert sorted(made) == [("digits/bp", 0), ("digits/bp", 1), ("digits/dfa", 0), ("digits/dfa", 1)]


def test_a_run_that_another_process_is_at_is_left_to_it(capsys):
    run = Run(Recipe.load(RECIPES / "digits" / "bp.yaml"), 0, 1)
    folder = run.folder(Path("runs"))
    folder.mkdir(parents=True)
    with FileLock(folder / "lock"):
        assert reproduce("--rule", "bp", "--seeds", "1", "--epochs", "1") == []
    assert "1 runs are another process's: digits/bp seed 0" in capsys.readouterr().out


@pytest.mark.slow
def test_a_longer_run_goes_on_from_a_shorter_one_and_holds_it():
    options = ["--rule", "dfc", "--seeds", "1"]
    (short,) = reproduce(*options, "--epochs", "2")
    _, long = reproduce(*options, "--epochs", "4")
    (straight,) = reproduce(*options, "--epochs", "4", results="others", runs="other")
    assert long.history == straight.history
    assert short.history == {name: values[:2] for name, values in long.history.items()}
    assert len(reproduce(*options, "--epochs", "3")) == 2  # nothing left to run
    assert long.after(2).value == short.value


@pytest.mark.slow
def test_what_is_noted_of_a_run_is_what_its_checkpoint_shows(capsys):
    (result,) = reproduce("--rule", "dfc", "--seeds", "1", "--epochs", "3")
    (best,) = Path("runs").rglob("epoch=*.ckpt")
    assert best.name.startswith(f"epoch={result.best_epoch}-")
    capsys.readouterr()
    cli.main(["test", f"--config={RECIPES / 'digits' / 'dfc.yaml'}", f"--ckpt_path={best}", "--trainer.logger=false"])
    (shown,) = re.findall(r"test/error\W+([\d.]+)", capsys.readouterr().out)
    assert float(shown) == pytest.approx(result.value, rel=1e-5)
    assert (result.metric, result.protocol_epochs, result.epochs) == ("test/error", 20, 3)
    assert result.seconds >= 3 * min(result.seconds_per_epoch, result.seconds / 3) > 0
    assert str(Path.cwd()) not in Path("results/table.jsonl").read_text()


@pytest.mark.slow
def test_testing_every_epoch_leaves_training_as_it_is(monkeypatch):
    (tested,) = reproduce("--rule", "dfc", "--seeds", "1", "--epochs", "3")
    monkeypatch.setattr("dfc_lightning.experiments.history.test_figures", lambda trainer, module: {"test/error": 0.0})
    (untested,) = reproduce("--rule", "dfc", "--seeds", "1", "--epochs", "3", results="others", runs="other")
    assert tested.history["train/loss"] == untested.history["train/loss"]


@pytest.mark.slow
def test_overrides_make_another_run(capsys):
    reproduce("--rule", "bp", "--seeds", "1", "--epochs", "1")
    _, short = reproduce("--rule", "bp", "--seeds", "1", "--epochs", "1", "--set", "trainer.limit_train_batches=2")
    assert short.overrides == ["trainer.limit_train_batches=2"]


@pytest.mark.slow
def test_a_run_that_fails_does_not_keep_the_others_from_running(tmp_path, monkeypatch):
    def broken(self):
        raise RuntimeError("no digits today")

    monkeypatch.setattr("dfc_lightning.data.Digits.train_dataloader", broken)
    with pytest.raises(SystemExit, match="bp seed 0: no digits today.*dfa seed 0: no digits today"):
        reproduce("--rule", "bp", "dfa", "--seeds", "1", "--epochs", "1")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--column", "mnits"], "--column mnits: .*choose from .*mnist"),
        (["--rule", "dfc_sss"], "--rule dfc_sss: .*choose from .*dfc_ss"),
        (["--seeds", "0"], "--seeds: '0' must be a whole number above zero"),
        (["--set", "trainer.precision"], "--set trainer.precision: give KEY=VALUE"),
        (["--recipes", "nowhere"], "--recipes nowhere: no recipes there"),
    ],
)
def test_a_bad_argument_is_named(capsys, options, words):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["reproduce", f"--recipes={RECIPES}", *options])
    assert stopped.value.code == 2 and re.search(words, capsys.readouterr().err, re.DOTALL)


@pytest.mark.parametrize(
    ("validation", "epochs", "value", "epoch"),
    [
        ([3.0, 1.0, 2.0], None, 20.0, 1),
        ([1.0, 2.0, 1.0], None, 10.0, 0),  # the first of equals
        ([3.0, 2.0, 1.0], 2, 20.0, 1),
        ([math.nan, 2.0, 3.0], None, 20.0, 1),
    ],
)
def test_a_test_figure_is_that_of_the_epoch_of_best_validation(validation, epochs, value, epoch):
    history = {"val/error": validation, "test/error": [10.0, 20.0, 30.0], "train/loss": [0.5, 0.1, 0.2]}
    assert reported(history, "test/error", epochs) == (value, epoch)
    assert reported(history, "train/loss") == (0.2, 2)


# 0.097 √(1/5 + 1/5) = 0.0613, twice that 0.1227; for one seed 0.097 √(1 + 1/5) = 0.1063, twice that 0.2125.
@pytest.mark.parametrize(
    ("mean", "std", "seeds", "expected"),
    [
        (2.41, 0.10, 5, "reproduced"),
        (2.42, 0.10, 5, "worse"),
        (2.17, 0.10, 5, "reproduced"),
        (2.16, 0.10, 5, "better"),
        (2.42, 1.00, 5, "worse"),  # however far the seeds lie apart
        (2.50, None, 1, "reproduced"),
        (2.51, None, 1, "worse"),
        (2.07, None, 1, "better"),
        (math.nan, None, 1, "worse"),
    ],
)
def test_a_cell_is_reproduced_within_two_standard_errors(mean, std, seeds, expected):
    assert mark(Summary(mean, std, seeds), Published("test/error", 2.29, 0.097, 5, "Table 1")) == expected


def line(name, seed, epochs, figures, **changes):
    recipe = Recipe.load(RECIPES / f"{name}.yaml")
    validation, test = figures
    result = {
        "recipe": name,
        "fingerprint": recipe.fingerprint,
        "overrides": [],
        "seed": seed,
        "epochs": epochs,
        "protocol_epochs": recipe.epochs,
        "metric": "test/error",
        "value": test[-1],
        "best_epoch": epochs - 1,
        "history": {"val/error": validation, "test/error": test},
        "seconds": 1000.0,
        "seconds_per_epoch": 12.5,
        "device": "cpu",
        "threads": 2,
        "versions": {},
    }
    return json.dumps(result | changes) + "\n"


def test_the_page_tells_full_runs_from_short_ones_and_lists_apart_what_is_not_the_table(tmp_path):
    falling = [5.0 - i / 100 for i in range(100)]
    lines = [line("mnist/dfc_ss", s, 100, (falling, [9.0] * 99 + [t])) for s, t in enumerate((2.2, 2.3, 2.4))]
    lines.append(line("mnist/dfc_ss", 0, 2, (falling[:2], [9.0, 8.0])))  # which seed 0 went on from
    lines.append(line("mnist/dfc", 0, 2, (falling[:2], [9.0, 3.0])))
    lines.append(line("mnist/bp", 0, 100, (falling, [9.0] * 100), fingerprint="of another"))
    other = {"overrides": ["trainer.limit_train_batches=1"]}
    other["fingerprint"] = Recipe.load(RECIPES / "mnist" / "dfa.yaml", other["overrides"]).fingerprint
    lines.append(line("mnist/dfa", 0, 3, (falling[:3], [9.0, 8.0, 7.0]), **other))
    lines.append(line("mnist/dfa", 1, 3, (falling[:3], [9.0, 8.0, 7.0]), **(other | {"fingerprint": "of another"})))
    lines += [line("mnist/lenet_bp", s, 10, (falling[:10], [1.0] * 9 + [t])) for s, t in enumerate((0.9, 1.1))]
    (tmp_path / "table.jsonl").write_text("".join(lines))
    cli.main(["report", f"--results={tmp_path}", f"--recipes={RECIPES}", f"--output={tmp_path / 'page.md'}"])
    text = (tmp_path / "page.md").read_text()
    assert "| DFC-SS | 2.29 ± 0.10 | 2.30 ± 0.10 | 3 | reproduced |" in text
    assert "| BP | 2.08 ± 0.15 |  |  | not yet run |" in text and "| DFA | 2.69 ± 0.11 |  |  | not yet run |" in text
    assert "| DFC | 2.25 ± 0.09 |  |  | not yet run |" in text
    assert "| MNIST, DFC | 2 of 100 | 3.00 | 1 | 2.25 ± 0.09 |" in text and text.count("2 of 100") == 1
    assert "| MNIST, DFC-SS | 12.5 | 1000 | 100 | cpu, 2 threads | 3.3 |" in text
    assert "| `mnist/dfa` | `trainer.limit_train_batches=1` | 3 | 7.00 | 1 | 12.5 |" in text
    assert "| `mnist/lenet_bp` |  | 10 | 1.00 ± 0.14 | 2 | 12.5 |" in text
    assert "2 runs of earlier versions" in text and "do not edit by hand" in text
    assert (tmp_path / "page.png").stat().st_size > 10_000 and str(tmp_path) not in text


def test_curves_are_in_the_units_of_the_table(tmp_path):
    history = {"history": {"train/loss": [3e-7, 2e-7]}, "metric": "train/loss", "value": 2e-7}
    (tmp_path / "table.jsonl").write_text(line("mnist_train_loss/bp", 0, 2, ([], [0.0]), **history))
    recipe = Recipe.load(RECIPES / "mnist_train_loss" / "bp.yaml")
    curves = Standing({recipe.name: recipe}, Ledger(tmp_path).read()).curves()
    (curve,) = curves["MNIST, training loss, 10⁻⁷"]["BP"]
    assert curve == pytest.approx([3.0, 2.0])


def test_a_line_that_is_no_run_is_named(tmp_path, capsys):
    (tmp_path / "table.jsonl").write_text('{"recipe": "mnist/bp"}\n')
    with pytest.raises(SystemExit) as stopped:
        cli.main(["report", f"--results={tmp_path}", f"--recipes={RECIPES}"])
    assert stopped.value.code == 2 and "table.jsonl, line 1 is no finished run" in capsys.readouterr().err
