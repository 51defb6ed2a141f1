"""What the benchmarks that train share: a quiet trainer, the time of its steps, and runs noted a line each."""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch


class Clock(L.Callback):
    """Seconds of each training step."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Note it."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Note it."""
        self.steps.append(time.perf_counter() - self._start)


def quiet_trainer(strategy: Any, callbacks: Sequence[L.Callback] = (), **limits: Any) -> L.Trainer:
    """A trainer on the CPU that writes nothing.

    Args:
        strategy: its strategy.
        callbacks: its callbacks.
        limits: how long it trains, as the trainer calls it.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    return L.Trainer(
        accelerator="cpu",
        strategy=strategy,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **limits,
    )


def arguments(description: str | None, out: str) -> argparse.ArgumentParser:
    """A parser with the options that all such benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default=torch.get_num_threads(), type=int, help="CPU threads of torch")
    parser.add_argument("--out", default=Path(out), type=Path, help=f"where the runs are noted (default: {out})")
    return parser


class Rows:
    """A file of runs, a line each.

    Args:
        path: the file, made if need be.
        key: by which entries runs are told apart.
    """

    def __init__(self, path: Path, key: Sequence[str]) -> None:
        self._path, self._key = path, key
        path.parent.mkdir(parents=True, exist_ok=True)
        self.all: list[dict[str, Any]] = []
        if path.exists():
            self.all = [json.loads(line) for line in path.read_text().splitlines()]

    def holds(self, **entries: Any) -> bool:
        """Whether such a run is noted."""
        return any(all(row[name] == entries[name] for name in self._key) for row in self.all)

    def add(self, row: dict[str, Any]) -> None:
        """Note a run, and say so."""
        self.all.append(row)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        said = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in row.items()}
        print(", ".join(f"{name} {value}" for name, value in said.items()), flush=True)
