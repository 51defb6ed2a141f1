"""Folders of runs, one a run, also where two start at the same instant."""

from __future__ import annotations

from pathlib import Path


def claim_version(root: Path) -> int:
    """Make the next ``version_*`` folder in ``root`` and return its number; no two processes get the same one."""
    root.mkdir(parents=True, exist_ok=True)
    taken = [path.name.removeprefix("version_") for path in root.glob("version_*")]
    number = max((int(name) for name in taken if name.isdecimal()), default=-1) + 1
    while True:
        try:
            (root / f"version_{number}").mkdir()
        except FileExistsError:
            number += 1
        else:
            return number
