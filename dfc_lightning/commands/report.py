"""``dfc report``: our results beside the published table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dfc_lightning.commands.options import add_recipes
from dfc_lightning.experiments.figures import draw_learning_curves
from dfc_lightning.experiments.ledger import Ledger
from dfc_lightning.experiments.recipe import Recipe, find_recipes
from dfc_lightning.experiments.report import Standing, page
from dfc_lightning.experiments.table import BENCHMARKS, COLUMNS


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: the words after its name.
    """
    arguments = argparse.ArgumentParser(
        prog="dfc report",
        description="Write a page that holds the runs of dfc reproduce against the published table and the field's "
        "benchmark, and a figure of their learning curves beside it.",
    )
    arguments.add_argument(
        "--results",
        nargs="+",
        type=Path,
        default=[Path("results")],
        metavar="DIR",
        help="default: results; several folders, of several machines, count as one",
    )
    add_recipes(arguments)
    arguments.add_argument(
        "--output", type=Path, default=Path("docs/results.md"), metavar="FILE", help="default: docs/results.md"
    )
    given = arguments.parse_args(args)
    paths = [p for p in find_recipes(given.recipes) if p.parent.name in COLUMNS | BENCHMARKS]
    if not paths:
        arguments.error(f"--recipes {given.recipes}: none of the table's recipes there; name the folder of mnist/, ...")
    absent = [str(folder) for folder in given.results if not (folder / "table.jsonl").exists()]
    if absent and len(given.results) > 1:
        arguments.error(f"--results {' '.join(absent)}: no table.jsonl there; name folders that dfc reproduce wrote to")
    try:
        results = [result for folder in given.results for result in Ledger(folder).read()]
        standing = Standing({r.name: r for r in map(Recipe.load, paths)}, results)
    except ValueError as error:
        arguments.error(str(error))
    figure = given.output.with_suffix(".png")
    panels = standing.curves()
    given.output.parent.mkdir(parents=True, exist_ok=True)
    if panels:
        draw_learning_curves(panels, figure)
    given.output.write_text(page(standing, figure.name if panels else None))
    done = sum(map(len, [*standing.full.values(), *standing.field.values()]))
    print(f"{given.output}: {done} runs by the whole protocol, {sum(map(len, standing.short.values()))} shorter ones")
