"""Nothing that comes with a checkpoint chooses what the ``dfc`` command imports or runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("jsonargparse")

from commands.test_cli import DIGITS, QUIET, SHORT, fit
from test_checkpoints import Bomb, served  # noqa: F401

from dfc_lightning import cli

pytestmark = pytest.mark.filterwarnings("ignore:(?s).*was deprecated in v4", "ignore:(?s).*JsonargparseDeprecation")
EVIL = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nclass Model: pass\n"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dfc"])


@pytest.fixture(scope="module")
def last(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("run")
    fit(*SHORT, f"--trainer.default_root_dir={folder}", f"--trainer.logger.init_args.save_dir={folder}")
    return torch.load(next(folder.rglob("last.ckpt")), weights_only=True)


HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "the model": {"_class_path": "evil.Model", "lr": 0.1},
    "a part of the model": {"network": {"class_path": "evil.Model", "init_args": {}}},
    "what builds it": {"_instantiator": "evil.Model"},
}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize("named", HYPERPARAMETERS)
def test_hyperparameters_name_no_class(command, named, last, tmp_path, monkeypatch, capsys):
    (tmp_path / "evil.py").write_text(EVIL)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.save({**last, "hyper_parameters": HYPERPARAMETERS[named]}, tmp_path / "evil.ckpt")
    options = SHORT if command == "fit" else QUIET
    cli.main([command, f"--config={DIGITS}", *options, "--ckpt_path=evil.ckpt"])
    assert "test/error" in capsys.readouterr().out  # the config's own model was tested
    assert not (tmp_path / "ran").exists() and "evil" not in sys.modules


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [[], ["--trainer.strategy=auto"]], ids=["dfc", "auto"])
@pytest.mark.parametrize("command", ["fit", "test"])
def test_an_address_runs_no_code(command, strategy, last, served, tmp_path):  # noqa: F811
    folder, address = served
    torch.save({**last, "hyper_parameters": {"lr": Bomb(tmp_path / "ran")}}, folder / "bomb.ckpt")
    options = SHORT if command == "fit" else QUIET
    with pytest.raises((SystemExit, Exception)):
        cli.main([command, f"--config={DIGITS}", *options, *strategy, f"--ckpt_path={address}/bomb.ckpt"])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04torn"], ids=["empty", "text", "torn"])
def test_the_command_says_in_a_sentence_what_a_checkpoint_is_not(content, tmp_path):
    Path("bad.ckpt").write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        fit(*SHORT, "--ckpt_path=bad.ckpt")
    assert str(stopped.value.code).startswith("error: The checkpoint bad.ckpt cannot be read")
