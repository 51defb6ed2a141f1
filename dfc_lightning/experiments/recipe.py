from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfc_lightning.experiments.composition import compose
from dfc_lightning.experiments.published import Published
from dfc_lightning.experiments.reading import CompositionError

_BESIDE_LEARNING = ("logger", "callbacks", "max_epochs", "log_every_n_steps", "accelerator", "devices")


@dataclass(frozen=True)
class Recipe:
    """A recipe's file, and what of its settings a table of results needs.

    Args:
        name: folder and file, e.g. ``"mnist/dfc_ss"``.
        path: the file.
        epochs: how many it trains.
        metric: the figure it is judged by.
        expected: the published value of that figure, if there is one.
        fingerprint: the same for all recipes that learn alike; logging, callbacks and epochs do not count.
    """

    name: str
    path: Path
    epochs: int
    metric: str
    expected: Published | None
    fingerprint: str

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """The recipe in a file, with options of the command line (``KEY=VALUE``) laid over it.

        Raises:
            CompositionError: it cannot be read, or its bases cannot be had.
            ValueError: it says neither what it should reach nor what to choose the best epoch by.
        """
        path = Path(path)
        tree = compose(path)
        trainer, expected = tree.get("trainer") or {}, published(tree, str(path))
        if not isinstance(trainer, Mapping):
            raise CompositionError(f"trainer={trainer!r} in {path}: give a mapping of its arguments.")
        metric = expected.metric if expected else monitored(trainer)
        if metric is None or not isinstance(trainer.get("max_epochs"), int):
            raise ValueError(
                f"{path} cannot be compared with others: give it trainer.max_epochs, and an expected.metric or a "
                "ModelCheckpoint that monitors a validation metric, e.g. val/error."
            )
        learning = {key: value for key, value in tree.items() if key not in ("trainer", "expected")}
        learning["trainer"] = {key: value for key, value in trainer.items() if key not in _BESIDE_LEARNING}
        learning["overrides"] = sorted(overrides)
        try:
            told = json.dumps(learning, sort_keys=True)
        except TypeError as error:  # keys of several types, dates
            raise CompositionError(f"{path} holds what no option can be: {error}. Put it in quotes.") from error
        fingerprint = hashlib.sha256(told.encode()).hexdigest()[:12]
        name = f"{path.resolve().parent.name}/{path.stem}"
        return cls(name, path, trainer["max_epochs"], metric, expected, fingerprint)


def find_recipes(root: str | Path) -> list[Path]:
    """The files of all recipes in ``root``: one folder deep, their names beginning with no underscore."""
    paths = (path.relative_to(root) for path in Path(root).glob("*/*.yaml"))
    return [Path(root) / path for path in sorted(paths) if not any(part.startswith("_") for part in path.parts)]


def monitored(trainer: Mapping[str, Any]) -> str | None:
    """The test figure that goes with the first validation metric that a callback monitors."""
    callbacks = trainer.get("callbacks") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        arguments = callback.get("init_args") if isinstance(callback, Mapping) else None
        monitor = arguments.get("monitor") if isinstance(arguments, Mapping) else None
        if isinstance(monitor, str) and monitor.startswith("val/"):
            return monitor.replace("val/", "test/", 1)
    return None


def published(tree: Mapping[str, Any], name: str) -> Published | None:
    """What the recipe says it should reach.

    Raises:
        CompositionError: it is not what :class:`Published` takes.
    """
    expected = tree.get("expected")
    if not expected:
        return None
    kinds = {"metric": str, "mean": (int, float), "std": (int, float), "seeds": int, "source": str}
    if not isinstance(expected, Mapping) or expected.keys() != kinds.keys():
        raise CompositionError(f"expected={expected!r} in {name}: give metric, mean, std, seeds and source.")
    for key, kind in kinds.items():
        if not isinstance(expected[key], kind):  # type: ignore[arg-type]
            raise CompositionError(
                f"expected.{key}={expected[key]!r} in {name}: give a {'text' if kind is str else 'number'}."
            )
    return Published(**expected)
