"""Checkpoints of an earlier layout of the package load, and their runs go on as they would have there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases.chains import close
from cases.fits import differing
from cases.saved_runs import FOLDER, NETS, resumed


@pytest.mark.parametrize("name", NETS)
def test_a_saved_run_goes_on_where_it_was_and_learns_what_it_would_have(name):
    before, after = resumed(name, FOLDER)
    saved = torch.load(FOLDER / f"{name}.ckpt", weights_only=True)["dfc_lightning"]
    before = as_far_as(before, saved)
    assert not differing({part: before[part] for part in ("feedback", "learner", "stages")}, without_seed(saved))
    theirs_before, theirs_after = torch.load(FOLDER / f"{name}_resumed.pt", weights_only=True)
    assert not differing(before, theirs_before)
    after = as_far_as(after, saved)
    assert after["stages"] == theirs_after["stages"] and after["learner"]["steps"] == theirs_after["learner"]["steps"]
    for part in ("weights", "feedback"):
        for where, start in before[part].items():
            moved, expected = after[part][where] - start, theirs_after[part][where] - start
            assert expected.any() and close(moved.double(), expected.double(), 1e-4), (part, where)


def as_far_as(now: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """What is known now, without what the saved run did not know of its stages."""
    return {**now, "stages": {name: now["stages"][name] for name in saved["stages"]}}


def without_seed(saved: dict[str, Any]) -> dict[str, Any]:
    return {part: value for part, value in saved.items() if part != "seed"}
