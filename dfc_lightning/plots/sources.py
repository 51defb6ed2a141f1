"""What loggers have kept of a run: rows of figures by name, with a ``step`` and, from Lightning, an ``epoch``."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

METRICS, EVENTS, WANDB = "metrics.csv", "events.out.tfevents.*", "wandb:"
Row = dict[str, float]


class RunError(ValueError):
    """A run that cannot be read; the message names it."""


def holds_run(folder: Path) -> bool:
    """Whether a ``CSVLogger`` or a ``TensorBoardLogger`` has written into the folder."""
    return (folder / METRICS).is_file() or any(folder.glob(EVENTS))


def logged_rows(folder: Path) -> Iterator[Row]:
    """What was logged into a folder; the CSV file's where there are both.

    Raises:
        RunError: it cannot be read.
    """
    return iter(_of_csv(folder / METRICS)) if (folder / METRICS).is_file() else _of_tensorboard(folder)


def wandb_rows(path: str) -> tuple[str, list[Row]]:
    """The name of a run on a Weights & Biases server, and what was logged to it.

    Args:
        path: ``entity/project/id``.

    Raises:
        RunError: it cannot be had.
    """
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise RunError(
            f"{WANDB}{path} is on a Weights & Biases server, which wandb asks: pip install wandb."
        ) from error
    try:
        run = wandb.Api().run(path)
        found = list(run.scan_history())
    except (wandb.Error, ValueError) as error:  # type: ignore[attr-defined]
        raise RunError(
            f"{WANDB}{path} cannot be had: {error}. Name it {WANDB}ENTITY/PROJECT/ID, and log in by wandb login."
        ) from error
    step = "trainer/global_step"
    rows = [{name: float(v) for name, v in row.items() if _is_figure(name, v)} for row in found]
    return run.name or path, [{"step": row.pop(step), **row} for row in rows if step in row]


def _is_figure(name: str, value: object) -> bool:
    return not name.startswith("_") and isinstance(value, (int, float)) and not isinstance(value, bool)


def _of_csv(path: Path) -> list[Row]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
        if not all("step" in row for row in rows):
            raise ValueError("a row has no step")
    except (ValueError, TypeError, csv.Error) as error:
        raise RunError(f"{path} is damaged: not what a CSVLogger writes ({error}). Give another run.") from error
    return rows


def _of_tensorboard(folder: Path) -> Iterator[Row]:
    try:
        from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped, unused-ignore]
            EventAccumulator,
        )
    except ModuleNotFoundError as error:
        raise RunError(f"{folder} was logged for TensorBoard, which reads it: pip install tensorboard.") from error
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    epochs = {each.step: each.value for each in scalars.pop("epoch", [])}
    for tag, values in scalars.items():
        by_lightning = all(each.step in epochs for each in values)  # which counts steps from zero
        for each in values:
            row = {"step": float(each.step), tag: each.value}
            yield row | {"epoch": epochs[each.step]} if by_lightning else row
