"""``dfc compare``: several recipes or finished runs in one table and one figure."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dfc_lightning.experiments.campaign import carry_out, positive, told_failures
from dfc_lightning.experiments.comparison import Entry, markdown, write
from dfc_lightning.experiments.finished import METRICS, FinishedRun
from dfc_lightning.experiments.ledger import Ledger
from dfc_lightning.experiments.protocol import reported
from dfc_lightning.experiments.recipe import Recipe
from dfc_lightning.experiments.runner import plan
from dfc_lightning.experiments.shipped import known_recipes
from dfc_lightning.experiments.table import Summary


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: the words after its name.
    """
    arguments = argparse.ArgumentParser(
        prog="dfc compare",
        description="Hold recipes and finished runs against each other and the published figures. Recipes are trained "
        "as dfc reproduce does, unless RESULTS has their runs already.",
    )
    arguments.add_argument(
        "what",
        nargs="+",
        type=Path,
        metavar="RECIPE_OR_RUN",
        help="a recipe's name, as dfc list has it, or its file, or a folder with a metrics.csv",
    )
    arguments.add_argument("--seeds", type=positive, default=1, metavar="N", help="seeds 0 to N - 1 (default: 1)")
    arguments.add_argument("--epochs", type=positive, metavar="N", help="train so many epochs, not the recipes'")
    arguments.add_argument(
        "--output", type=Path, default=Path("runs/compare"), metavar="DIR", help="default: runs/compare"
    )
    arguments.add_argument(
        "--results",
        type=Path,
        default=Path("runs/results"),
        metavar="DIR",
        help="where finished runs are noted (default: runs/results); dfc reproduce has results",
    )
    arguments.add_argument(
        "--runs", type=Path, default=Path("runs/reproduce"), metavar="DIR", help="checkpoints (default: runs/reproduce)"
    )
    given = arguments.parse_args(args)
    try:
        sources = [_source(path) for path in given.what]
    except ValueError as error:
        arguments.error(str(error))
    planned = plan([s for s in sources if isinstance(s, Recipe)], given.seeds, given.epochs)
    ledger = Ledger(given.results)
    outcome = carry_out(planned, given.runs, ledger)
    if outcome.failed or outcome.claimed:
        reasons = [f"{run}: another process is at it" for run in outcome.claimed]
        reasons += [told_failures(outcome.failed)] if outcome.failed else []
        sys.exit("error: not compared: " + "; ".join(reasons))
    entries = [
        _trained(source, ledger, given.seeds, given.epochs) if isinstance(source, Recipe) else _finished(source)
        for source in sources
    ]
    write(entries, given.output)
    print(markdown(entries), f"\n{given.output / 'comparison'}.md, .csv, .json, .png", sep="")


def _source(path: Path) -> Recipe | FinishedRun:
    if (path / METRICS).is_file():
        return FinishedRun.read(path)
    if not path.is_file() and path.as_posix() not in known_recipes():
        raise ValueError(
            f"{path} is neither a recipe, by name or file, nor a folder with a {METRICS}: name one of these"
        )
    return Recipe.load(path if path.is_file() else known_recipes()[path.as_posix()])


def _trained(recipe: Recipe, ledger: Ledger, seeds: int, epochs: int | None) -> Entry:
    epochs = epochs or recipe.epochs
    runs = [run.done(ledger) for run in plan([recipe], seeds, epochs)]
    histories = [run.history for run in runs if run is not None]
    values = [reported(history, recipe.metric, epochs).value for history in histories]
    watched = recipe.metric.replace("test/", "val/", 1)
    curves = [list(history[watched])[:epochs] for history in histories]
    return Entry(recipe.name, recipe.metric, epochs, Summary.of(values), recipe.expected, curves)


def _finished(run: FinishedRun) -> Entry:
    curve = run.history[run.metric.replace("test/", "val/", 1)]
    return Entry(run.name, run.metric, len(curve), Summary.of([run.value]), run.expected, [curve])
