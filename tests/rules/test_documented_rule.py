"""docs/rules.md: its rule works as it is printed there, from a file of the user's, in Python and from YAML."""

from __future__ import annotations

import re
import sys

import pytest
import torch
import yaml
from cases.paths import RECIPES, ROOT

from dfc_lightning import cli


@pytest.fixture
def printed(tmp_path, monkeypatch) -> dict[str, str]:
    """The page's blocks by language; its rule as alignment.py in the working directory."""
    blocks = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs" / "rules.md").read_text(), re.DOTALL)
    found = {language: code for language, code in reversed(blocks)}
    (tmp_path / "alignment.py").write_text(found["python"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["dfc"])
    sys.modules.pop("alignment", None)
    return found


def test_the_rule_of_the_page_trains_by_a_line_of_yaml_and_is_in_the_checkpoint(printed, tmp_path):
    settings = yaml.safe_load(printed["yaml"])
    settings["trainer"] |= {"max_epochs": 2, "enable_progress_bar": False, "enable_model_summary": False}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"base": str(RECIPES / "digits" / "bp.yaml"), **settings}))
    cli.main(["fit", f"--config={tmp_path / 'mine.yaml'}", "--trainer.accelerator=cpu", "--seed_everything=1"])
    saved = max(tmp_path.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    checkpoint = torch.load(saved, weights_only=True)
    feedback = checkpoint["dfc_lightning"]["feedback"]
    weights = [value for name, value in checkpoint["state_dict"].items() if name.endswith("weight")]
    assert [tuple(b.shape) for b in feedback.values()] == [tuple(w.shape) for w in weights]
    assert not any(torch.equal(b, w) for b, w in zip(feedback.values(), weights))
