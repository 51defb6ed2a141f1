"""The ledger takes whole lines, each run once, or says that it could not."""

import dataclasses
import json
import os
import re
import sys
import threading
from pathlib import Path

import pytest
from cases.paths import RECIPES

pytest.importorskip("jsonargparse")

from dfc_lightning import cli
from dfc_lightning.experiments import ledger as ledger_module
from dfc_lightning.experiments.ledger import Ledger, LedgerError, Result

REPRODUCE = ["reproduce", f"--recipes={RECIPES}", "--column", "digits", "--rule", "bp", "--seeds=1", "--epochs=1"]
SHORT = ["--runs=runs", "--set", "trainer.limit_train_batches=2"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dfc"])


def result(seed=0, epochs=1):
    history = {"val/error": [5.0] * epochs, "test/error": [6.0] * epochs}
    return Result("digits/bp", "f", [], seed, epochs, 20, "test/error", 6.0, 0, history, 1.0, 1.0, "cpu", 1)


def disk_of(monkeypatch, size):
    """A disk on which the ledger's file can have so many bytes: a write beyond takes a part, the next one none."""
    write = os.write

    def limited(file, data):
        room = size - os.fstat(file).st_size
        if room <= 0:
            raise OSError(28, "No space left on device")
        return write(file, data[:room])

    monkeypatch.setattr(ledger_module.os, "write", limited)


def test_a_full_disk_leaves_the_ledger_as_it_was_and_is_an_error(monkeypatch):
    ledger = Ledger("results")
    ledger.append(result(0))
    before = ledger.path.read_bytes()
    with monkeypatch.context() as patch:
        disk_of(patch, len(before) + 50)
        with pytest.raises(LedgerError, match=r"could not be noted in .*table.jsonl: No space left on device"):
            ledger.append(result(1))
    assert ledger.path.read_bytes() == before
    ledger.append(result(1))
    assert [r.seed for r in ledger.read()] == [0, 1]


def test_what_is_read_back_must_be_what_was_written(monkeypatch):
    def lossy(file, data, write=os.write):  # says it has taken all, as a write-back cache does
        write(file, data[:40])
        return len(data)

    ledger = Ledger("results")
    monkeypatch.setattr(ledger_module.os, "write", lossy)
    with pytest.raises(LedgerError, match="read back"):
        ledger.append(result())
    assert ledger.path.read_bytes() == b""


def test_a_line_in_several_writes_is_whole(monkeypatch):
    monkeypatch.setattr(ledger_module.os, "write", lambda file, data, write=os.write: write(file, data[:7]))
    Ledger("results").append(result())
    assert Ledger("results").read() == [result()]


def test_after_a_torn_line_the_next_begins_on_its_own():
    ledger = Ledger("results")
    ledger.append(result(0))
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole + whole[:30])
    with pytest.raises(LedgerError, match="line 2 is no finished run"):
        ledger.read()
    ledger_module._append(ledger.path, json.dumps({"a": 1}).encode() + b"\n")
    assert ledger.path.read_bytes().split(b"\n") == [whole[:-1], whole[:30], b'{"a": 1}', b""]


def test_many_writers_neither_tear_nor_double():
    def note():
        for seed in range(10):
            Ledger("results").append(result(seed))

    threads = [threading.Thread(target=note) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(r.seed for r in Ledger("results").read()) == list(range(10))


def test_a_longer_run_is_noted_beside_the_shorter():
    ledger = Ledger("results")
    ledger.append(result(epochs=1))
    longer = ledger.append(result(epochs=2))
    assert longer.epochs == 2 and [r.epochs for r in ledger.read()] == [1, 2]


def good(**changes):
    """A line as the ledger has it: what is not known is left out."""
    known = {name: value for name, value in dataclasses.asdict(result()).items() if value is not None}
    return json.dumps(known | changes).encode()


BAD_LINES = {
    "blank": b"",
    "spaces": b"   ",
    "binary": bytes(range(128, 256)),
    "zeros": b"\0" * 64,
    "cut short": good()[:80],
    "words": b"hello",
    "a list": b"[1, 2]",
    "a number": b"17",
    "null": b"null",
    "other keys": b'{"recipe": "mnist/bp"}',
    "nested": b"[" * 100_000,
    "recipe of the wrong kind": good(recipe=5),
    "history of the wrong kind": good(history=[1]),
    "history without the figure": good(history={"val/error": [1.0]}),
    "history of words": good(history={"val/error": ["a"], "test/error": ["b"]}),
    "epochs as words": good(epochs="many"),
    "two lines in one": good() + good(),
}


@pytest.mark.slow
@pytest.mark.parametrize("bad", BAD_LINES.values(), ids=BAD_LINES)
@pytest.mark.parametrize("command", ["report", "reproduce"])
def test_a_line_that_is_no_run_is_named_by_every_command(capsys, bad, command):
    Path("results").mkdir()
    Path("results/table.jsonl").write_bytes(good() + b"\n" + bad + b"\n" + good() + b"\n")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["report", f"--recipes={RECIPES}"] if command == "report" else [*REPRODUCE, *SHORT])
    said = f"{stopped.value.code} {capsys.readouterr().err}"
    assert stopped.value.code != 0 and re.search("table.jsonl, line 2 is no finished run.*Remove it", said), said


def test_text_with_any_separator_of_lines_is_one_line():
    odd = dataclasses.replace(result(), device="a\u2028b\x85c")
    Ledger("results").append(odd)
    assert Ledger("results").read() == [odd]


@pytest.mark.slow
def test_a_run_that_could_not_be_noted_is_not_lost(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        disk_of(patch, 100)
        with pytest.raises(SystemExit) as stopped:
            cli.main([*REPRODUCE, *SHORT])
    assert re.search(
        r"error: failed: digits/bp seed 0: the run is finished, but .*No space left on device.*figures and checkpoints "
        r"are in (runs/\S+)\. Give the same command again",
        str(stopped.value.code),
    )
    assert "0 runs finished" in capsys.readouterr().out and Ledger("results").read() == []

    def trained(self, *args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr("dfc_lightning.models.Classifier.training_step", trained)
    cli.main([*REPRODUCE, *SHORT])
    (noted,) = Ledger("results").read()
    assert noted.epochs == 1 and len(noted.history["test/error"]) == 1


@pytest.mark.parametrize("torn", ["results", "results/table.jsonl"])
def test_results_that_cannot_be_are_refused_before_anything_runs(torn, capsys):
    if torn == "results":
        Path(torn).write_text("mine")
    else:
        Path(torn).mkdir(parents=True)
    for command in ([*REPRODUCE, *SHORT], ["report", f"--recipes={RECIPES}"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(command)
        said = f"{stopped.value.code} {capsys.readouterr().err}"
        assert stopped.value.code != 0 and torn in said and "error:" in said
    assert not Path("runs").exists()
