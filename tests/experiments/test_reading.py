"""Recipes are read within bounds: what would hang is refused by a sentence that names the file."""

import json
import re
import sys
import time
from pathlib import Path

import pytest
from cases.paths import RECIPES

pytest.importorskip("jsonargparse")

import yaml

from dfc_lightning import cli
from dfc_lightning.experiments.composition import compose
from dfc_lightning.experiments.reading import CompositionError, parse_settings
from dfc_lightning.experiments.recipe import find_recipes


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dfc"])


def nine_times(open_bracket, close_bracket, entry):
    """Ten levels, each of nine aliases of the one before: 9^10 values."""
    lines = [f"a0: &a0 {open_bracket}{', '.join(entry.format(k=k, value='x') for k in range(9))}{close_bracket}"]
    for level in range(1, 10):
        values = ", ".join(entry.format(k=k, value=f"*a{level - 1}") for k in range(9))
        lines.append(f"a{level}: &a{level} {open_bracket}{values}{close_bracket}")
    return "\n".join(lines)


UNREADABLE = {
    "aliases of lists": (nine_times("[", "]", "{value}"), "more than 10,000 settings"),
    "aliases of mappings": (nine_times("{", "}", "k{k}: {value}"), "more than 10,000 settings"),
    "merged aliases": (
        "\n".join(
            ["a0: &a0 {x: 1}"] + [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 10)]
        ),
        "more than 10,000 settings",
    ),
    "an alias in its own list": ("a: &a [1, *a]", r"alias \*a .*leads back to itself"),
    "an alias in its own mapping": ("a: &a {b: {c: [*a]}}", r"alias \*a .*leads back to itself"),
    "deep": ("a: " + "[" * 60 + "]" * 60, "more than 50 deep"),
    "very deep": ("a: " + "[" * 100_000, "no valid YAML|deep"),
    "deep by indents": ("\n".join("  " * k + "a:" for k in range(200)), "more than 50 deep"),
    "long": (f"a: {'x' * 1_100_000}", r"(larger|longer) than 1,000,000"),
    "many": (f"a: [{'1, ' * 20_000}]", "more than 10,000 settings"),
    "no date": ("a: 2020-99-99", "no valid YAML"),
    "no number": (f"a: {'9' * 5000}", "no valid YAML"),
    "code": ("a: !!python/object/apply:os.system [ls]", "no valid YAML"),
    "unknown alias": ("a: *nothing", "no valid YAML"),
    "unclosed": ("a: [", "no valid YAML"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("text", "words"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_is_refused_at_once_wherever_it_stands(capsys, text, words):
    Path("bad.yaml").write_text(text)
    Path("above.yaml").write_text("base: bad.yaml\n")
    begun = time.process_time()
    for path in ("bad.yaml", "above.yaml"):
        with pytest.raises(CompositionError, match=words) as refused:
            compose(path)
        assert "bad.yaml" in str(refused.value)
        with pytest.raises(SystemExit) as stopped:
            cli.main(["fit", f"--config={path}"])
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and "bad.yaml" in said and re.search(words, said, re.DOTALL), said
        assert len(said) < 1000
    assert time.process_time() - begun < 10


@pytest.mark.parametrize("option", ["trainer", "model", "data"])
def test_a_file_that_an_option_names_is_bounded_too(capsys, option):
    Path("bad.yaml").write_text(UNREADABLE["aliases of lists"][0])
    with pytest.raises(SystemExit) as stopped:
        cli.main(["fit", f"--config={RECIPES}/digits/bp.yaml", f"--{option}=bad.yaml"])
    said = f"{stopped.value.code} {capsys.readouterr().err}"
    assert stopped.value.code != 0 and "more than 10,000 settings" in said


def doubled(levels, width=2):
    for level in range(levels):
        Path(f"r{level}.yaml").write_text(f"base: [{', '.join([f'r{level + 1}.yaml'] * width)}]\n")
    Path(f"r{levels}.yaml").write_text("trainer: {max_epochs: 1}\n")


@pytest.mark.parametrize(("levels", "width"), [(22, 2), (1, 200), (100, 1)])
def test_too_many_bases_are_refused_at_once(capsys, levels, width):
    doubled(levels, width)
    with pytest.raises(CompositionError, match=r"r0.yaml is made of more than 64 files"):
        compose("r0.yaml")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["fit", "--config=r0.yaml"])
    assert stopped.value.code == 2 and "r0.yaml is made of more than 64 files" in capsys.readouterr().err


def test_bases_and_aliases_in_measure_are_read_as_ever():
    doubled(3)
    assert compose("r0.yaml") == {"trainer": {"max_epochs": 1}}
    text = "a: &a {x: [1, 2.5], y: null}\nb: [*a, *a]\nc: {<<: *a, z: yes}\n"
    assert parse_settings(text, "it") == yaml.safe_load(text)
    assert parse_settings("", "it") is None


def test_our_own_recipes_are_far_from_the_bounds():
    for path in find_recipes(RECIPES):
        assert len(json.dumps(compose(path))) < 10_000


@pytest.mark.parametrize("content", [bytes(range(128, 256)), b"\0" * 100, "a: b".encode("utf-16")])
def test_a_file_that_is_no_text_is_named(capsys, content):
    Path("bad.yaml").write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["fit", "--config=bad.yaml"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "bad.yaml" in said and len(said) < 1000
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", "bad.yaml"])
    assert stopped.value.code == 2 and "bad.yaml" in capsys.readouterr().err
