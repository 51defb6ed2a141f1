"""``dfc list``: the recipes, what each reproduces, what to expect of it, its data and its price."""

from __future__ import annotations

import argparse
import shutil
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dfc_lightning.experiments.composition import compose
from dfc_lightning.experiments.ledger import Ledger, Result
from dfc_lightning.experiments.published import Published
from dfc_lightning.experiments.recipe import Recipe, published
from dfc_lightning.experiments.shipped import known_recipes, shipped

_TO_DOWNLOAD = {"MNIST": "12 MB", "FashionMNIST": "31 MB", "CIFAR10": "170 MB", "CIFAR100": "169 MB"}


@dataclass(frozen=True)
class _Entry:
    name: str
    opening: str
    expected: Published | None
    results: Sequence[Result]
    data: str

    @property
    def published(self) -> str:
        return f"{self.expected.metric} {self.expected.mean:g} ± {self.expected.std:g}" if self.expected else ""

    @property
    def ours(self) -> str:
        values = [result.value for result in self.results]
        if not values:
            return ""
        spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
        return f"{self.results[0].metric} {statistics.fmean(values):.3g}{spread}"

    @property
    def price(self) -> str:
        return _duration(statistics.median(r.seconds for r in self.results)) if self.results else ""

    def told(self) -> list[str]:
        told, count = [self.opening], len(self.results)
        if self.expected:
            told.append(f"published: {self.published}, {self.expected.seeds} seeds, {self.expected.source}")
        if count:
            first = self.results[0]
            told.append(f"ours: {self.ours}, {count} seed{'s' if count > 1 else ''}")
            threads = f"{first.threads} thread{'s' if first.threads > 1 else ''}"
            told.append(f"price: {self.price} for {first.epochs} epochs on {first.device}, {threads}")
        download = _TO_DOWNLOAD.get(self.data)
        return [*told, f"data: {self.data}, " + (f"{download} to download" if download else "nothing to download")]


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: the words after its name.
    """
    arguments = argparse.ArgumentParser(
        prog="dfc list",
        description="The recipes, run by dfc fit --recipe NAME: what each reproduces, the published figure and ours, "
        "its price as measured on a CPU, and its data. A NAME tells more.",
        allow_abbrev=False,
    )
    arguments.add_argument("name", nargs="*", metavar="NAME", help="what their names begin with, e.g. mnist/ or digits")
    given = arguments.parse_args(args)
    known = known_recipes()
    for name in given.name:
        if not any(each.startswith(name) for each in known):
            arguments.error(f"NAME={name}: no recipe's name begins so; dfc list has them all")
    chosen = sorted(name for name in known if name.startswith(tuple(given.name) or ""))
    results = _results()
    entries = [entry for name in chosen if (entry := _entry(name, known[name], results)).data]
    print(_details(entries) if given.name else _table(entries))


def _results() -> list[Result]:
    """Finished runs by the whole protocol."""
    folder = shipped("results")
    results = Ledger(folder).read() if folder is not None else []
    return [r for r in results if not r.overrides and r.epochs == r.protocol_epochs]


def _entry(name: str, path: Path, results: Sequence[Result]) -> _Entry:
    tree = compose(path)
    data = str((tree.get("data") or {}).get("class_path", "")).rpartition(".")[2]
    mine = [result for result in results if result.recipe == name]
    if mine:
        fingerprint = Recipe.load(path).fingerprint
        mine = [result for result in mine if result.fingerprint == fingerprint]
    expected = published(tree, str(path))
    return _Entry(name, _opening(path, whole=expected is None), expected, mine, data)


def _opening(path: Path, whole: bool) -> str:
    """What a recipe's comment says, up to what differs; also its source, if ``whole``."""
    words: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.removeprefix("#").strip()
        if not line.startswith("#") or text.startswith("Differs:") or (text.startswith("Source:") and not whole):
            break
        words.append(text)
    return " ".join(" ".join(words).split())


def _details(entries: Sequence[_Entry]) -> str:
    width = min(shutil.get_terminal_size().columns, 120)
    wrapped = [
        "\n".join(textwrap.fill(line, width, initial_indent="  ", subsequent_indent="    ") for line in entry.told())
        for entry in entries
    ]
    return "\n\n".join(f"{entry.name}\n{told}" for entry, told in zip(entries, wrapped))


def _table(entries: Sequence[_Entry]) -> str:
    rows = [("recipe", "published", "ours", "price", "data")]
    rows += [(entry.name, entry.published, entry.ours, entry.price, entry.data) for entry in entries]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, "", "dfc list NAME tells more; dfc fit --recipe NAME runs one."])


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes:.0f} min" if minutes < 90 else f"{hours:.1f} h"
