"""Every command ends in a sentence on stderr and a code that is not zero, whatever a person does to it."""

import errno
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cases.paths import RECIPES

pytest.importorskip("jsonargparse")

import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from dfc_lightning import cli
from dfc_lightning.experiments.errors import sentence
from dfc_lightning.experiments.ledger import Ledger
from dfc_lightning.experiments.versions import claim_version
from dfc_lightning.interrupts import is_the_command

DIGITS = RECIPES / "digits" / "bp.yaml"
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
SHORT = [*QUIET, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.num_sanity_val_steps=0"]
FIT = ["fit", f"--config={DIGITS}", *SHORT]
REPRODUCE = ["reproduce", f"--recipes={RECIPES}", "--column=digits", "--rule=bp", "--seeds=1", "--epochs=1"]
COMMANDS = {
    "fit": (FIT, "dfc_lightning.data.Digits.setup"),
    "validate": (["validate", *FIT[1:-3]], "dfc_lightning.data.Digits.setup"),
    "reproduce": ([*REPRODUCE, "--runs=runs"], "dfc_lightning.data.Digits.setup"),
    "compare": (["compare", str(DIGITS), "--epochs=1", "--runs=runs"], "dfc_lightning.data.Digits.setup"),
    "report": (["report", f"--recipes={RECIPES}"], "dfc_lightning.commands.report.page"),
    "plot": (["plot", "--figure=figure_2"], "dfc_lightning.commands.plot.small_jacobian"),
}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dfc"])


def ended(capsys, words):
    """The code a shell would see, and what stands on stderr."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    code, said = stopped.value.code, capsys.readouterr().err
    return (1, said + code) if isinstance(code, str) else (code, said)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_ends_every_command_with_its_code_and_how_to_go_on(capsys, monkeypatch, command, number, code):
    words, where = COMMANDS[command]
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def stop(*args, **kwargs):
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        if number == signal.SIGTERM:  # which a trainer keeps for the end of a batch
            raise SIGTERMException

    monkeypatch.setattr(where, stop)
    found, said = ended(capsys, words)
    assert found == code and f"error: stopped by {number.name}." in said and "Traceback" not in said
    assert shlex.join(["dfc", *words]) in said
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_fit_names_the_checkpoint_to_go_on_from(capsys, monkeypatch):
    def stop(self, trainer, module):
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("lightning.pytorch.callbacks.ModelCheckpoint.on_train_epoch_start", stop, raising=False)
    code, said = ended(capsys, [*FIT, "--trainer.max_epochs=3"])
    assert code == 130
    assert shlex.split(re.search(r"To go on from there: (dfc .*)", said)[1]) == [
        "dfc",
        "resume",
        "runs/digits/bp/version_0",
    ]
    assert Path("runs/digits/bp/version_0/checkpoints/last.ckpt").is_file()


def test_a_signal_in_the_last_batch_ends_the_campaign_after_noting_the_run(capsys, monkeypatch):
    from dfc_lightning.experiments.history import HistoryFile

    def stop(self, trainer, module):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(HistoryFile, "on_train_end", stop)
    code, said = ended(capsys, [*REPRODUCE[:-2], "--seeds=3", "--epochs=1", "--runs=runs"])
    assert code == 143 and "stopped by SIGTERM" in said
    assert [r.seed for r in Ledger("results").read()] == [0]


def broken_by(error):
    def fail(*args, **kwargs):
        raise error

    return fail


SYSTEM_ERRORS = {
    "no permission": PermissionError(errno.EACCES, "Permission denied", "there"),
    "read-only": OSError(errno.EROFS, "Read-only file system", "there"),
    "full": OSError(errno.ENOSPC, "No space left on device", "there"),
    "a file in the way": FileExistsError(errno.EEXIST, "File exists", "there"),
    "a file above": NotADirectoryError(errno.ENOTDIR, "Not a directory", "there"),
    "missing": FileNotFoundError(errno.ENOENT, "No such file or directory", "there"),
}


@pytest.mark.slow
@pytest.mark.parametrize("error", SYSTEM_ERRORS.values(), ids=SYSTEM_ERRORS)
@pytest.mark.parametrize("command", COMMANDS)
def test_what_the_system_refuses_is_a_sentence_with_path_and_remedy(capsys, monkeypatch, command, error):
    words, where = COMMANDS[command]
    monkeypatch.setattr(where, broken_by(error))
    code, said = ended(capsys, words)
    assert code in (1, 2) and re.search(rf"error: .*there: {error.strerror}\. [A-Z]", said, re.DOTALL), said
    assert "Traceback" not in said


UNWRITABLE = "/proc/nowhere"  # also for root


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    "words",
    [
        [*FIT, f"--trainer.logger.init_args.save_dir={UNWRITABLE}"],
        ["plot", "--figure=figure_2", f"--output={UNWRITABLE}/a.png"],
        ["plot", "--figure=figure_2", "--output=/proc/a.png"],
        ["report", f"--recipes={RECIPES}", f"--output={UNWRITABLE}/a.md"],
        [*REPRODUCE, f"--runs={UNWRITABLE}"],
        [*REPRODUCE, f"--results={UNWRITABLE}"],
        ["compare", str(DIGITS), "--epochs=1", f"--output={UNWRITABLE}", "--runs=runs"],
        ["compare", str(DIGITS), "--epochs=1", f"--results={UNWRITABLE}"],
    ],
    ids=lambda words: f"{words[0]} {words[-1].split('=')[0]}",
)
def test_a_place_that_cannot_be_written_to_is_named(capsys, words):
    code, said = ended(capsys, words)
    assert code in (1, 2) and "error: " in said and "/proc" in said and "Traceback" not in said


def test_a_file_where_a_folder_should_be_is_named(capsys):
    Path("taken").write_text("mine")
    for words in (
        [*FIT, "--trainer.logger.init_args.save_dir=taken"],
        ["plot", "--figure=figure_2", "--output=taken/a.png"],
        ["report", f"--recipes={RECIPES}", "--output=taken/a.md"],
        [*REPRODUCE, "--runs=taken"],
        [*REPRODUCE, "--results=taken"],
    ):
        code, said = ended(capsys, words)
        assert code in (1, 2) and "error: " in said and "taken" in said and "Traceback" not in said, words
    assert Path("taken").read_text() == "mine"


@pytest.mark.parametrize("content", [b"\0\1\2\n\0\n", bytes(range(128, 256)), b"epoch,step,val/error\n0,1,high\n"])
@pytest.mark.parametrize("command", ["plot", "compare"])
def test_a_damaged_run_is_named(capsys, command, content):
    Path("run").mkdir()
    Path("run/metrics.csv").write_bytes(content)
    code, said = ended(capsys, [command, "run"])
    assert code == 2 and "metrics.csv" in said and "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("words"),
        lambda path: path.write_bytes(bytes(range(256)) * 9),
        lambda path: torch.save([1, 2], path),
        lambda path: torch.save({"weights": 1}, path),
        lambda path: (
            torch.save({"state_dict": {"a": torch.zeros(1000)}}, path) or path.write_bytes(path.read_bytes()[:999])
        ),
    ],
    ids=["empty", "words", "binary", "a list", "weights", "cut short"],
)
@pytest.mark.parametrize("command", ["fit", "test"])
def test_a_file_that_is_no_checkpoint_is_named(capsys, command, write):
    write(Path("bad.ckpt"))
    code, said = ended(capsys, [command, f"--config={DIGITS}", *QUIET, "--ckpt_path=bad.ckpt"])
    assert code == 1 and re.search("error: The (checkpoint|file) bad.ckpt .*(go on|give one)", said), said


def test_an_unforeseen_error_is_no_sentence():
    assert sentence(KeyError("broken")) is None and sentence(ValueError("broken")) is None


# Version folders


def test_a_claim_takes_the_number_after_the_last(tmp_path):
    (tmp_path / "version_4").mkdir()
    (tmp_path / "version_x").mkdir()
    assert claim_version(tmp_path) == 5 and claim_version(tmp_path) == 6


def test_a_claim_that_comes_second_takes_the_next_number(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(()))  # what both saw before either had made its own
    assert [claim_version(tmp_path) for _ in range(3)] == [0, 1, 2]


def test_two_fits_begun_before_either_has_written_keep_apart(monkeypatch):
    monkeypatch.setattr(cli.RecipeCLI, "_run_subcommand", lambda self, command: None)
    made = [cli.RecipeCLI(FIT) for _ in range(2)]
    assert [each.trainer.log_dir for each in made] == [f"runs/digits/bp/version_{k}" for k in (0, 1)]
    assert made[0].config.fit.trainer.logger.init_args.version is None  # a saved config claims anew


def test_a_refused_option_claims_no_version(capsys):
    code, _ = ended(capsys, [*FIT, "--data.init_args.validation_size=5000"])
    assert code == 2 and not list(Path("runs").rglob("version_*"))


# Signals to a real process


@pytest.mark.parametrize(
    ("argv", "original", "ours"),
    [
        (["/usr/bin/dfc", "fit"], ["python", "/usr/bin/dfc", "fit"], True),
        (["-m", "fit"], ["python", "-X", "dev", "-m", "dfc_lightning", "fit"], True),
        (["-m"], ["python", "-m", "mine"], False),  # a program that imports the package
        (["-m"], ["python", "-mdfc_lightning"], False),
        (["dfc.py"], ["python", "dfc.py"], False),
        (["/usr/bin/pytest"], ["python", "-m", "dfc_lightning"], False),
        ([""], ["python"], False),
        ([], [], False),
    ],
)
def test_only_the_command_takes_signals_while_importing(argv, original, ours):
    assert is_the_command(argv, original) == ours


def start(*words):
    command = [sys.executable, "-m", "dfc_lightning", *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.processes
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_campaign_that_is_stopped_says_how_to_go_on_and_goes_on(number, code):
    words = [*REPRODUCE[:-1], "--epochs=300", "--runs=runs"]
    process = start(*words)
    for _ in range(1200):
        if any(Path("runs").rglob("last.ckpt")) or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert "Traceback" not in said and f"error: stopped by {number.name}" in said
    assert shlex.join(["dfc", *words]) in said and Ledger("results").read() == []


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("words", [FIT, ["plot", "--figure=figure_2"]], ids=["fit", "plot"])
def test_a_signal_at_any_moment_leaves_no_traceback(words, number):
    begun = time.perf_counter()
    assert start(*words).wait(timeout=120) == 0
    whole = time.perf_counter() - begun
    for part in (0.2, 0.6, 1.0):
        process = start(*words)
        time.sleep(part * whole)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        # Minus the number: at the interpreter's own end, which takes handlers back. A shell sees the same code.
        assert process.returncode in (0, 128 + number, -number), (part, said)
        assert "Traceback" not in said and ("stopped by" in said) == (process.returncode > 0), (part, said)
