"""The file of finished runs: ``table.jsonl``, a line each, written by any number of processes side by side."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

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
        peak_bytes: the most memory it held; None where that is not known. See :class:`PeakMemory`.
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
    peak_bytes: int | None = None

    def after(self, epochs: int) -> Reported:
        """The figure this run had reached after so many epochs."""
        return reported(self.history, self.metric, epochs)


class LedgerError(ValueError):
    """The ledger cannot be read or written; the message says what to do."""


class Ledger:
    """The finished runs in a folder.

    Args:
        folder: where ``table.jsonl`` is, or will be.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "table.jsonl"
        self._lock = FileLock(self.path.with_suffix(".lock"))

    def check_writable(self) -> None:
        """Make the file if there is none, so that it is not after a run that it proves impossible.

        Raises:
            LedgerError: results cannot be noted here.
        """
        try:
            self._make_folder()
            with self._lock, self.path.open("ab"):
                pass
        except OSError as error:
            raise LedgerError(
                f"Results cannot be noted in {self.path}: {error.strerror or error}. Name another folder by --results, "
                "or change its permissions."
            ) from error

    def append(self, result: Result) -> Result:
        """Add a line, unless another process has added one of the same run meanwhile.

        Returns:
            What is noted of the run.

        Raises:
            LedgerError: it could not be noted. The file is as it was.
        """
        entry = {name: value for name, value in asdict(result).items() if value is not None}
        line = json.dumps(_told(entry), ensure_ascii=False, allow_nan=False) + "\n"
        try:
            self._make_folder()
            with self._lock:
                for other in self.read():
                    if _key(other) == _key(result) and other.epochs == result.epochs:
                        return other
                _append(self.path, line.encode())
        except OSError as error:
            raise LedgerError(f"it could not be noted in {self.path}: {error.strerror or error}") from error
        return result

    def read(self) -> list[Result]:
        """All lines, or none if there is no file.

        Raises:
            LedgerError: a line is not one of this class's, or the file cannot be read.
        """
        if self.path.parent.exists() and not self.path.parent.is_dir():
            raise LedgerError(f"{self.path.parent} is a file: name a folder of results, or move the file away.")
        try:
            content = self._content()
        except OSError as error:
            raise LedgerError(f"{self.path} cannot be read: {error.strerror or error}. Check what it is.") from error
        lines = content.split(b"\n")  # nowhere else: text in a line may hold other separators
        if lines[-1] == b"":
            lines.pop()
        return [self._result(line, number) for number, line in enumerate(lines, 1)]

    def _make_folder(self) -> None:
        if self.path.parent.exists() and not self.path.parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{self.path.parent} is a file, not a folder")
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def _content(self) -> bytes:
        if not self.path.exists():
            return b""
        content = self.path.read_bytes()
        if content and not content.endswith(b"\n"):  # perhaps being written at this moment
            with suppress(OSError), self._lock:
                content = self.path.read_bytes()
        return content

    def _result(self, line: bytes, number: int) -> Result:
        try:
            return _checked(_heard(json.loads(line.decode())))
        except (ValueError, TypeError, RecursionError) as error:
            raise LedgerError(
                f"{self.path}, line {number} is no finished run: {error}. Remove it, and run dfc reproduce again."
            ) from error

    def find(self, recipe: str, fingerprint: str, seed: int, epochs: int) -> Result | None:
        """A run of at least so many epochs, the shortest."""
        fitting = [
            result for result in self.read() if _key(result) == (recipe, fingerprint, seed) and result.epochs >= epochs
        ]
        return min(fitting, key=lambda result: result.epochs, default=None)


def longest(results: Iterable[Result]) -> list[Result]:
    """Of several runs of the same recipe and seed, which a longer one goes on from, the longest."""
    kept: dict[tuple[str, str, int], Result] = {}
    for result in results:
        if _key(result) not in kept or result.epochs > kept[_key(result)].epochs:
            kept[_key(result)] = result
    return list(kept.values())


def _key(result: Result) -> tuple[str, str, int]:
    return result.recipe, result.fingerprint, result.seed


def _append(path: Path, line: bytes) -> None:
    """Write a whole line, on disk and read back, or leave the file as it was."""
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        end = os.fstat(file).st_size
        if end and os.pread(file, 1, end - 1) != b"\n":  # cut short, by a crash
            line = b"\n" + line
        try:
            written = 0
            while written < len(line):  # a full disk takes a part, and the next write tells why
                written += os.write(file, line[written:])
            os.fsync(file)
            if os.pread(file, len(line), end) != line:
                raise OSError(errno.EIO, "what was read back is not what was written")
        except BaseException:
            with suppress(OSError):
                os.ftruncate(file, end)
            raise
    finally:
        os.close(file)


def _checked(entry: Any) -> Result:
    """The result that a line holds.

    Raises:
        ValueError: it holds another thing.
    """
    if not isinstance(entry, dict):
        raise ValueError("it is not a mapping")
    result = Result(**entry)
    for name, kind in _KINDS.items():
        value = getattr(result, name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{name}={value!r} is of the wrong kind")
    if not isinstance(result.peak_bytes, (int, type(None))):
        raise ValueError(f"peak_bytes={result.peak_bytes!r} is of the wrong kind")
    watched = {result.metric, result.metric.replace("test/", "val/", 1)}
    for name, series in result.history.items():
        if not isinstance(series, list) or not all(isinstance(figure, (int, float)) for figure in series):
            raise ValueError(f"history.{name} is not a list of numbers")
        watched -= {name} if series else set()
    if watched:
        raise ValueError(f"its history has no {' and no '.join(sorted(watched))}")
    return result


_NUMBER = (int, float)
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("recipe", "fingerprint", "metric", "device"), str),
    **dict.fromkeys(("seed", "epochs", "protocol_epochs", "best_epoch", "threads"), int),
    **dict.fromkeys(("value", "seconds", "seconds_per_epoch"), _NUMBER),
    "overrides": list,
    "history": dict,
    "versions": dict,
}


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
