"""A campaign outlives bad recipes and torn checkpoints."""

import re
import shutil
import sys
from pathlib import Path

import pytest
from cases.paths import RECIPES

pytest.importorskip("jsonargparse")

from dfc_lightning import cli
from dfc_lightning.experiments.checkpoints import is_whole, newest_whole
from dfc_lightning.experiments.ledger import Ledger


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dfc"])


def reproduce(*options, recipes=RECIPES, column="digits"):
    words = ["--runs=runs", "--set", "trainer.limit_train_batches=2", "--seeds=1"]
    cli.main(["reproduce", f"--recipes={recipes}", "--column", column, *words, *options])


BAD_RECIPES = {
    "unknown key": ("trainer: {max_epoch: 3}\n", "max_epoch"),
    "unknown class": ("data: {class_path: dfc_lightning.data.Nowhere}\n", "Nowhere"),
    "bad argument": ("data: {init_args: {validation_size: 5000}}\n", "validation_size=5000"),
    "no YAML": ("trainer: [\n", "no valid YAML"),
    "no epochs": ("trainer: {max_epochs: null}\n", "trainer.max_epochs"),
    "self-referring alias": ("x: &x [*x]\n", "leads back to itself"),
    "binary": (bytes(range(128, 256)), "no text"),
    "trainer of the wrong kind": ("trainer: 3\n", "trainer=3"),
    "published of the wrong kind": ("expected: {mean: much}\n", "expected="),
}


@pytest.mark.slow
@pytest.mark.parametrize(("content", "words"), BAD_RECIPES.values(), ids=BAD_RECIPES)
def test_good_recipes_run_and_bad_ones_are_listed_at_the_end(capsys, content, words):
    Path("own/digits").mkdir(parents=True)
    bad, good = Path("own/digits/bp.yaml"), Path("own/digits/dfa.yaml")
    if isinstance(content, bytes):
        bad.write_bytes(content)
    else:
        bad.write_text(f"base: {RECIPES}/digits/bp.yaml\n{content}")
    good.write_text(f"base: {RECIPES}/digits/dfa.yaml\n")
    with pytest.raises(SystemExit) as stopped:
        reproduce("--epochs=1", recipes="own")
    said = str(stopped.value.code)
    assert re.search(rf"^error: failed: \S*digits/bp\S*.*{words}", said, re.DOTALL) and "dfa" not in said
    assert [r.recipe for r in Ledger("results").read()] == ["digits/dfa"]
    assert "1 runs finished" in capsys.readouterr().out


def cut_short(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwritten_in_the_middle(path):
    content = bytearray(path.read_bytes())
    content[1000:1100] = b"\0" * 100
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("tear", [cut_short, overwritten_in_the_middle, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("all_torn", [False, True])
def test_a_run_whose_checkpoint_is_torn_goes_on_from_the_one_before_it(tear, all_torn):
    reproduce("--rule=bp", "--epochs=3")
    (straight,) = Ledger("results").read()
    shutil.rmtree("results")
    shutil.rmtree("runs")
    reproduce("--rule=bp", "--epochs=2")
    shutil.rmtree("results")
    (folder,) = Path("runs").rglob("checkpoints")
    torn = [path for path in folder.glob("*.ckpt") if all_torn or path.name == "last.ckpt"]
    assert torn
    for path in torn:
        tear(path)
        assert not is_whole(path)
    with pytest.warns(UserWarning, match="last.ckpt was not written to its end"):
        reproduce("--rule=bp", "--epochs=3")
    (resumed,) = Ledger("results").read()
    assert resumed.history == straight.history


def test_the_newest_whole_checkpoint_is_taken(tmp_path):
    assert newest_whole(tmp_path / "nowhere") is None
