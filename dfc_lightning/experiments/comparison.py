"""Recipes and finished runs in one table, as Markdown, CSV and JSON, and in one figure."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dfc_lightning.experiments.figures import draw_learning_curves
from dfc_lightning.experiments.published import Published
from dfc_lightning.experiments.table import Summary


@dataclass(frozen=True)
class Entry:
    """A line of the table.

    Args:
        name: the recipe, or the run.
        metric: the figure compared.
        epochs: how many were trained.
        ours: that figure over seeds.
        published: what the recipe should reach, if known.
        curves: the validation figure, or the training loss compared, over epochs for each seed.
    """

    name: str
    metric: str
    epochs: int
    ours: Summary
    published: Published | None
    curves: Sequence[Sequence[float]]


def markdown(entries: Sequence[Entry]) -> str:
    """The table."""
    lines = ["| | figure | ours | seeds | epochs | published |", "|---|---|--:|--:|--:|---|"]
    for entry in entries:
        ours = f"{entry.ours.mean:.4g}" + ("" if entry.ours.std is None else f" ± {entry.ours.std:.2g}")
        published = str(entry.published or "")
        lines.append(f"| {entry.name} | {entry.metric} | {ours} | {entry.ours.seeds} | {entry.epochs} | {published} |")
    return "\n".join(lines) + "\n"


def write(entries: Sequence[Entry], folder: Path) -> None:
    """Write ``comparison.md``, ``.csv``, ``.json`` and ``.png`` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.md").write_text(markdown(entries))
    rows = [_row(entry) for entry in entries]
    (folder / "comparison.json").write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    with (folder / "comparison.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    panels: dict[str, dict[str, Sequence[Sequence[float]]]] = {}
    for entry in entries:
        watched = entry.metric.replace("test/", "val/", 1)
        panels.setdefault(watched, {})[entry.name] = entry.curves
    draw_learning_curves(panels, folder / "comparison.png")


def _row(entry: Entry) -> dict[str, object]:
    published = entry.published
    return {
        "name": entry.name,
        "metric": entry.metric,
        "mean": entry.ours.mean,
        "std": entry.ours.std,
        "seeds": entry.ours.seeds,
        "epochs": entry.epochs,
        "published_mean": published and published.mean,
        "published_std": published and published.std,
        "published_seeds": published and published.seeds,
        "source": published and published.source,
    }
