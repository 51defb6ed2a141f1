"""``dfc compare``: recipes and finished runs in one table."""

import csv
import json
import re
import statistics
import sys

import pytest
from cases.paths import RECIPES

pytest.importorskip("jsonargparse")

from dfc_lightning import cli
from dfc_lightning.experiments.ledger import Ledger

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dfc"])


@pytest.mark.slow
def test_recipes_and_a_finished_run_stand_in_one_table(tmp_path, capsys):
    mine = (
        f"base: {RECIPES}/digits/bp.yaml\nexpected: {{metric: test/error, mean: 4, std: 1, seeds: 3, source: Here}}\n"
    )
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "bp.yaml").write_text(mine)
    cli.main(["fit", "--config=own/bp.yaml", *QUIET, "--trainer.max_epochs=2"])
    told = re.search(r"test/error (\S+) \(.*\); published 4 ± 1, 3 seeds, Here", capsys.readouterr().out)
    options = ["--epochs=2", "--seeds=2", "--output=out"]
    cli.main(["compare", f"{RECIPES}/digits/dfa.yaml", "own/bp.yaml", "runs/digits/bp/version_0", *options])
    results = Ledger("runs/results").read()
    assert sorted((r.recipe, r.seed) for r in results) == [
        (f"{n}", s) for n in ("digits/dfa", "own/bp") for s in (0, 1)
    ]

    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [(row["name"], row["seeds"]) for row in rows] == [
        ("digits/dfa", 2),
        ("own/bp", 2),
        ("digits/bp/version_0", 1),
    ]
    values = [r.value for r in results if r.recipe == "own/bp"]
    assert rows[1]["mean"] == pytest.approx(statistics.fmean(values))
    assert rows[1]["std"] == pytest.approx(statistics.stdev(values))
    assert rows[2]["mean"] == pytest.approx(float(told[1]), rel=1e-3)
    assert [row["published_mean"] for row in rows] == [None, 4, 4] and rows[2]["source"] == "Here"
    table = list(csv.DictReader((tmp_path / "out" / "comparison.csv").open()))
    assert [row["name"] for row in table] == [row["name"] for row in rows]
    shown = (tmp_path / "out" / "comparison.md").read_text()
    assert "4 ± 1, 3 seeds, Here" in shown and shown in capsys.readouterr().out
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 10_000

    cli.main(["compare", f"{RECIPES}/digits/dfa.yaml", *options])
    assert len(Ledger("runs/results").read()) == len(results)  # nothing was trained again


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("nowhere.yaml", "nowhere.yaml is neither a recipe, by name or file, nor a folder with a metrics.csv"),
        ("bare.yaml", "bare.yaml cannot be compared with others: give it trainer.max_epochs"),
        ("begun", "begun has no test/error in metrics.csv: it has not ended"),
    ],
)
def test_what_cannot_be_compared_is_named(tmp_path, capsys, argument, words):
    (tmp_path / "bare.yaml").write_text("trainer: {}\n")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "metrics.csv").write_text("epoch,step,val/error\n0,9,50.0\n")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", argument])
    assert stopped.value.code == 2 and words in " ".join(capsys.readouterr().err.split())
