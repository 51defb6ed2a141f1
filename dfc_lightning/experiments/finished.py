"""Runs of ``dfc fit``, or of any Trainer with a CSVLogger, as they lie in their folders."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from dfc_lightning.experiments.composition import compose
from dfc_lightning.experiments.protocol import reported
from dfc_lightning.experiments.published import Published
from dfc_lightning.experiments.recipe import monitored, published

METRICS = "metrics.csv"


@dataclass(frozen=True)
class FinishedRun:
    """What a run's folder tells.

    Args:
        name: its folder's last names, e.g. ``"digits/dfc/version_0"``.
        metric: the figure it is judged by.
        value: that figure: as tested at the end, or else by the protocol.
        history: every epoch's figures by name.
        expected: the published value, if the recipe has one.
    """

    name: str
    metric: str
    value: float
    history: dict[str, list[float]]
    expected: Published | None

    @classmethod
    def read(cls, folder: Path) -> FinishedRun:
        """The run in a folder.

        Raises:
            ValueError: its figures do not tell how it did.
        """
        by_epoch: dict[str, dict[int, float]] = {}
        try:
            with (folder / METRICS).open(encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file):
                    for name, value in row.items():
                        if value and name.startswith(("train/", "val/", "test/")):
                            by_epoch.setdefault(name, {})[int(row["epoch"])] = float(value)
        except (ValueError, TypeError, KeyError, AttributeError, csv.Error) as error:
            raise ValueError(
                f"{folder / METRICS} is damaged: not what a CSVLogger writes ({error}). Run again, or leave it out."
            ) from error
        history = {name: [values[epoch] for epoch in sorted(values)] for name, values in by_epoch.items()}
        config = folder / "config.yaml"
        tree = compose(config) if config.exists() else {}
        expected, trainer = published(tree, str(config)), tree.get("trainer")
        metric = expected.metric if expected else monitored(trainer if isinstance(trainer, dict) else {})
        metric = metric or next((name for name in ("test/error", "test/loss") if name in history), "test/error")
        if metric not in history:
            raise ValueError(f"{folder} has no {metric} in {METRICS}: it has not ended; let it end, or leave it out.")
        tested_once = metric.startswith("test/") and len(history[metric]) == 1
        value = history[metric][0] if tested_once else reported(history, metric).value
        return cls("/".join(folder.resolve().parts[-3:]), metric, value, history, expected)
