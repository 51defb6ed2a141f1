"""Going on with a run in its own folder: from which checkpoint, and with the curves it has drawn so far."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from typing_extensions import override

from dfc_lightning.errors import ControlError
from dfc_lightning.experiments.checkpoints import is_whole, require_checkpoint
from dfc_lightning.training.checkpoint import CHECKPOINT_KEY

CONFIG, METRICS, CHECKPOINTS, LAST = "config.yaml", "metrics.csv", "checkpoints", "last.ckpt"
_OF_A_BATCH_ON = ("train/", "val/", "test/")


def folder_of(checkpoint: Path) -> Path | None:
    """The folder of the run that a checkpoint lies in; None if it lies by itself."""
    run = checkpoint.resolve().parent.parent
    inside = checkpoint.resolve().parent.name == CHECKPOINTS
    return run if inside and any((run / name).is_file() for name in (CONFIG, METRICS)) else None


def roots(trainer: Mapping[str, Any]) -> list[Path]:
    """Where the runs of a recipe lie, a folder each.

    Args:
        trainer: the recipe's options of the trainer.
    """
    loggers = trainer.get("logger")
    above = Path(trainer.get("default_root_dir") or ".")
    if loggers is False:
        return [above]
    given: list[Any] = loggers if isinstance(loggers, list) else [loggers]
    arguments = [each.get("init_args") or {} for each in given if hasattr(each, "get")]
    found = [Path(a["save_dir"]) / (a.get("name") or "") for a in arguments if a.get("save_dir")]
    return found or [above / "lightning_logs"]


def newest_last(folders: Iterable[Path]) -> Path | None:
    """The last checkpoint of the run among ``folders`` that was written to most lately, itself or its versions."""
    patterns = (f"{CHECKPOINTS}/{LAST}", f"version_*/{CHECKPOINTS}/{LAST}")
    found = [path for folder in folders for pattern in patterns for path in folder.glob(pattern)]
    whole = (path for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True) if is_whole(path))
    return next(whole, None)


def named(name: str, folders: Sequence[Path]) -> Path:
    """The checkpoint called ``"last"`` or ``"best"`` of the newest run in ``folders``.

    Raises:
        ControlError: there is none.
    """
    last = newest_last(folders)
    found = last if last is None or name == "last" else _best(last)
    if found is None:
        places = ", ".join(str(folder) for folder in folders)
        raise ControlError(
            f"--ckpt_path={name}: no run in {places} has a {name} checkpoint. Give the path of a checkpoint, or leave "
            "the option out to begin anew."
        )
    return found


def _best(last: Path) -> Path | None:
    """What the first callback that monitors a figure had kept as best when ``last`` was written."""
    for key, state in (require_checkpoint(last).get("callbacks") or {}).items():
        if "ModelCheckpoint" in key and state.get("monitor") and state.get("best_model_path"):
            best = last.parent / Path(state["best_model_path"]).name
            return best if best.is_file() else None
    return None


def checkpoint_of(run: Path) -> Path:
    """What to go on from in ``run``: the folder of a run, one with its versions, or a checkpoint.

    Raises:
        ControlError: there is none, or no config beside it.
    """
    found = run if run.is_file() else newest_last([run])
    if found is None:
        raise ControlError(
            f"{run} has no {CHECKPOINTS}/{LAST} to go on from: give the folder of a run that has, such as "
            "runs/digits/dfc/version_0, or the path of a checkpoint in it."
        )
    folder = folder_of(found)
    if folder is None or not (folder / CONFIG).is_file():
        raise ControlError(
            f"{found} has no {CONFIG} in the folder above its own, by which the run could be known: give dfc fit the "
            "recipe's --config and this file by --ckpt_path."
        )
    return found


class GoesOn(Callback):
    """Has checkpoint callbacks take up what they have kept, wherever the run's folder lies by now.

    They would know it by its path alone, and forget the best score if it is named otherwise.
    """

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        states = checkpoint.get("callbacks") or {}
        for callback in trainer.checkpoint_callbacks:
            state = states.get(callback.state_key)
            if isinstance(callback, ModelCheckpoint) and state and callback.dirpath and state.get("dirpath"):
                states[callback.state_key] = _moved(state, state["dirpath"], str(callback.dirpath))


def _moved(state: Mapping[str, Any], before: str, now: str) -> dict[str, Any]:
    def path(name: Any) -> Any:
        if not isinstance(name, str) or not name.startswith(before):
            return name
        there = now + name.removeprefix(before)
        return there if Path(there).is_file() else name

    moved = {key: path(value) for key, value in state.items()}
    moved["best_k_models"] = {path(name): score for name, score in state.get("best_k_models", {}).items()}
    return {**moved, "dirpath": now}


def rows_before(run: Path, checkpoint: Mapping[str, Any]) -> list[dict[str, str]]:
    """The rows of a run's ``metrics.csv`` that were written before its checkpoint."""
    path = run / METRICS
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    steps = checkpoint.get("global_step", 0)
    learner = (checkpoint.get(CHECKPOINT_KEY) or {}).get("learner") or {}
    later = (i for i, row in enumerate(rows) if _is_after(row, steps, learner.get("steps")))
    return rows[: next(later, len(rows))]


def _is_after(row: Mapping[str, str | None], steps: int, feedback_steps: int | None) -> bool:
    try:
        step = float(row.get("step") or -1)
        feedback = float(row.get("feedback/step") or -1)
    except ValueError:
        return False
    of_a_batch = any(value and name.startswith(_OF_A_BATCH_ON) for name, value in row.items() if name)
    return step > steps or (of_a_batch and step >= steps) or (feedback_steps is not None and feedback > feedback_steps)


def logged_in(run: Path, root: Path) -> dict[str, Any]:
    """Arguments by which a logger that keeps versions in ``root`` goes on in ``run``, or in its own of that name."""
    number = run.name.removeprefix("version_")
    version = int(number) if number.isdecimal() and run.name.startswith("version_") else run.name
    if (root / run.name).is_dir():
        return {"version": version}
    return {"save_dir": str(run.parent.parent), "name": run.parent.name, "version": version}


def take_up(loggers: Sequence[Any], run: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Have the logger of ``run`` add to ``rows`` of its table, which it would begin anew."""
    for logger in loggers:
        if not isinstance(logger, CSVLogger) or Path(logger.log_dir).resolve() != run.resolve():
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it deletes the table
            writer = logger.experiment
        if not rows:
            continue
        names = sorted(name for name in rows[0] if name)
        with (run / METRICS).open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, names, extrasaction="ignore")
            table.writeheader()
            table.writerows(rows)
        writer.metrics_keys = names
