"""``dfc reproduce``: run the cells of the published table that are missing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dfc_lightning.commands.options import add_recipes
from dfc_lightning.experiments.campaign import carry_out, positive, told_failures
from dfc_lightning.experiments.ledger import Ledger
from dfc_lightning.experiments.recipe import Recipe, find_recipes
from dfc_lightning.experiments.runner import plan
from dfc_lightning.experiments.table import COLUMNS, RULES

_DESCRIPTION = """\
Run the published table's cells, each by its recipe and with several seeds, and note every finished run in
RESULTS/table.jsonl. What is noted there already is not run again. A run that was interrupted, even killed, goes on
from its last complete epoch; so does one that was shorter (--epochs). Several processes may work side by side: none
takes up what another is at. On machines that share no disk, --shard I/N with I from 1 to N gives each a part of the
runs, the same one every time; dfc report puts their ledgers together. Then: dfc report.
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(
        prog="dfc reproduce", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--column", nargs="+", metavar="NAME", help=f"folders of recipes (default: {' '.join(COLUMNS)})")
    made.add_argument(
        "--rule",
        nargs="+",
        metavar="NAME",
        help=f"recipes in these (default: {' '.join(RULES)}; all of a folder beside the table)",
    )
    made.add_argument("--seeds", type=positive, default=5, metavar="N", help="seeds 0 to N - 1 (default: 5)")
    made.add_argument(
        "--epochs", type=positive, metavar="N", help="train so many epochs, not the recipe's; kept apart in the report"
    )
    made.add_argument(
        "--shard", type=shard, metavar="I/N", help="of the runs only the I-th, the (I+N)-th, ..., e.g. 3/8"
    )
    made.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="default: results")
    add_recipes(made)
    made.add_argument(
        "--runs", type=Path, default=Path("runs/reproduce"), metavar="DIR", help="checkpoints (default: runs/reproduce)"
    )
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of dfc fit for every run, e.g. trainer.limit_train_batches=20; the report lists such "
        "runs apart",
    )
    return made


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: the words after its name.
    """
    arguments = parser()
    given = arguments.parse_args(args)
    try:
        paths = _chosen(given)
    except ValueError as error:
        arguments.error(str(error))
    recipes, refused = _loaded(paths, given.set)
    planned = plan(recipes, given.seeds, given.epochs, given.set)
    if given.shard is not None:
        first, step = given.shard
        planned = planned[first - 1 :: step]
    outcome = carry_out(planned, given.runs, Ledger(given.results))
    print(f"{len(outcome.results)} runs finished, noted in {given.results / 'table.jsonl'}")
    if outcome.claimed:
        print(f"{len(outcome.claimed)} runs are another process's: {', '.join(map(str, outcome.claimed))}")
    if refused or outcome.failed:
        sys.exit(f"error: failed: {told_failures([*refused, *outcome.failed])}")


def _loaded(paths: Sequence[Path], overrides: Sequence[str]) -> tuple[list[Recipe], list[tuple[Path, Exception]]]:
    """The recipes, and those that cannot be had, which keep no other from running."""
    recipes: list[Recipe] = []
    refused: list[tuple[Path, Exception]] = []
    for path in paths:
        try:
            recipes.append(Recipe.load(path, overrides))
        except (ValueError, OSError) as error:
            refused.append((path, error))
    return recipes, refused


def _chosen(given: argparse.Namespace) -> list[Path]:
    for override in given.set:
        if "=" not in override or override.startswith("-"):
            raise ValueError(f"--set {override}: give KEY=VALUE, e.g. trainer.limit_train_batches=20")
    there = {(path.parent.name, path.stem): path for path in find_recipes(given.recipes)}
    if not there:
        raise ValueError(
            f"--recipes {given.recipes}: no recipes there; name the folder that holds mnist/, digits/, ..."
        )
    for option, position, names in (("--column", 0, given.column), ("--rule", 1, given.rule)):
        known = sorted({names[position] for names in there})
        for name in names or []:
            if name not in known:
                raise ValueError(f"{option} {name}: not in {given.recipes}; choose from {', '.join(known)}")
    columns = given.column or COLUMNS
    paths = [
        there[column, rule]
        for column in columns
        for rule in given.rule or (RULES if column in COLUMNS else [rule for folder, rule in there if folder == column])
        if (column, rule) in there
    ]
    if not paths:
        rules = given.rule or RULES
        raise ValueError(
            f"--column {' '.join(columns)} --rule {' '.join(rules)}: there is no such recipe; choose others"
        )
    return paths


def shard(text: str) -> tuple[int, int]:
    """``I/N``, for argparse."""
    first, _, number = text.partition("/")
    if not (first.isdecimal() and number.isdecimal() and 1 <= int(first) <= int(number)):
        raise argparse.ArgumentTypeError(f"{text!r} must be I/N with I from 1 to N, e.g. 3/8")
    return int(first), int(number)
