"""The file of finished runs: ``table.jsonl``, a line each, written by any number of processes side by side."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dfc_lightning.experiments.protocol import Reported, reported


@dataclass(frozen=True)
class Result:
    """A finished run.

    Args:
        recipe: the recipe's name.
        fingerprint: of the recipe's settings and the overrides; see :class:`Recipe`.
        overrides: options laid over the recipe, ``KEY=VALUE``.
        seed: the run's seed.
        epochs: how many were trained.
        protocol_epochs: how many the recipe asks for.
        metric: the figure the recipe is judged by.
        value: that figure, by the protocol.
        best_epoch: the epoch, from 0, it is of.
        history: every epoch's figures by name.
        seconds: wall time of all epochs, feedback passes included.
        seconds_per_epoch: the median epoch's.
        device: what it ran on.
        threads: torch's.
        versions: of Python and the libraries.
    """

    recipe: str
    fingerprint: str
    overrides: list[str]
    seed: int
    epochs: int
    protocol_epochs: int
    metric: str
    value: float
    best_epoch: int
    history: dict[str, list[float]]
    seconds: float
    seconds_per_epoch: float
    device: str
    threads: int
    versions: dict[str, str] = field(default_factory=dict)

    def after(self, epochs: int) -> Reported:
        """The figure this run had reached after so many epochs."""
        return reported(self.history, self.metric, epochs)


class Ledger:
    """The finished runs in a folder.

    Args:
        folder: where ``table.jsonl`` is, or will be.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "table.jsonl"

    def append(self, result: Result) -> None:
        """Add a line, in one write, so that processes do not mix theirs."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(_told(asdict(result)), ensure_ascii=False, allow_nan=False) + "\n"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode())
            os.fsync(file)
        finally:
            os.close(file)

    def read(self) -> list[Result]:
        """All lines, or none if there is no file.

        Raises:
            ValueError: a line is not one of this class's.
        """
        if not self.path.exists():
            return []
        results = []
        for number, line in enumerate(self.path.read_text().splitlines(), 1):
            try:
                results.append(Result(**_heard(json.loads(line))))
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{self.path}, line {number} is no finished run: {error}. Remove it, and run dfc reproduce again."
                ) from error
        return results

    def find(self, recipe: str, fingerprint: str, seed: int, epochs: int) -> Result | None:
        """A run of at least so many epochs, the shortest."""
        fitting = [
            result
            for result in self.read()
            if (result.recipe, result.fingerprint, result.seed) == (recipe, fingerprint, seed)
            and result.epochs >= epochs
        ]
        return min(fitting, key=lambda result: result.epochs, default=None)


def longest(results: Iterable[Result]) -> list[Result]:
    """Of several runs of the same recipe and seed, which a longer one goes on from, the longest."""
    kept: dict[tuple[str, str, int], Result] = {}
    for result in results:
        key = result.recipe, result.fingerprint, result.seed
        if key not in kept or result.epochs > kept[key].epochs:
            kept[key] = result
    return list(kept.values())


def _told(value: Any) -> Any:
    """JSON has no infinities; six digits are enough."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _told(entry) for key, entry in value.items()}
    return [_told(entry) for entry in value] if isinstance(value, list) else value


def _heard(value: Any) -> Any:
    if value is None:
        return math.nan
    if isinstance(value, dict):
        return {key: _heard(entry) for key, entry in value.items()}
    return [_heard(entry) for entry in value] if isinstance(value, list) else value
