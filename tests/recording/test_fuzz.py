"""Random modules train with exactly backprop's gradients under ``Backprop()``, or are refused by name."""

from __future__ import annotations

import os

import pytest
from cases.fuzz import outcome

SEEDS, BLOCK = int(os.environ.get("DFC_FUZZ", "240")), 20
"""``DFC_FUZZ=5000 pytest tests/recording/test_fuzz.py`` tries more."""


@pytest.mark.parametrize("first", range(0, SEEDS, BLOCK))
def test_a_module_trains_exactly_or_is_refused_by_name(first):
    kinds = set()
    for seed in range(first, min(first + BLOCK, SEEDS)):
        found = outcome(seed, deep=seed % 4 == 0)
        kinds.add(found.kind)
        assert found.kind != "wrong", f"seed {seed}: {found.told}\nmade of {', '.join(found.sample.words)}"
    assert {"trained", "refused"} <= kinds
