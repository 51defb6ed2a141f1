"""The part of the page that holds the field's benchmark: ours beside other projects' figures, with the price."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from dfc_lightning.experiments.ledger import Result
from dfc_lightning.experiments.peers import BESIDE, PEERS, Peer
from dfc_lightning.experiments.protocol import best_test
from dfc_lightning.experiments.recipe import Recipe
from dfc_lightning.experiments.table import BENCHMARKS, FIELD, NETWORKS, Summary, figure_text

Runs = Mapping[str, Sequence[Result]]
"""Finished runs by their recipes' names."""

_ABOUT = (
    "Recipes `{column}/*`, {epochs} epochs; one learning rate and weight decay for all rules. *Best validation*: the "
    "test error at the epoch of best validation, mean ± standard deviation over seeds. *Best test*: the lowest test "
    "error of all epochs, which is chosen by the test set and therefore too good; beside what others report so. "
    "The price is the wall time of the median epoch, feedback learning, validation and test included, and the same in "
    "epochs of backprop on the same kind of machine, which may have been busy with other work; memory is the most that "
    "the process held, on a GPU the most that was allocated there."
)


def benchmark(column: str, recipes: Mapping[str, Recipe], runs: Runs) -> str | None:
    """A column of the benchmark, a table a network; None if nothing was run or published of it.

    Args:
        column: the folder of its recipes.
        recipes: all recipes, by name.
        runs: those of this column's recipes as they are, by the whole protocol.
    """
    tables = [table for network in NETWORKS if (table := _table(column, network, recipes, runs))]
    if not tables:
        return None
    epochs = next(recipe.epochs for name, recipe in recipes.items() if name.startswith(f"{column}/"))
    opening = f"## {BENCHMARKS[column].title}\n\n{_ABOUT.format(column=column, epochs=epochs)}"
    peers = {peer.name: peer for network in NETWORKS for peer in PEERS.get((column, network), ())}
    notes = [f"{peer.name}: {peer.source}." for peer in peers.values()]
    return "\n\n".join([opening, *tables, *([" ".join([*notes, BESIDE])] if notes else [])])


def _table(column: str, network: str, recipes: Mapping[str, Recipe], runs: Runs) -> str | None:
    peers = PEERS.get((column, network), ())
    names = {rule: f"{column}/{network}_{rule}" for rule in FIELD}
    rows = [rule for rule, name in names.items() if runs.get(name) or (peers and _known(name, rule, recipes, peers))]
    if not rows:
        return None
    header = ["rule", *(peer.name for peer in peers), "best validation", "best test", "seeds", "seconds an epoch"]
    header += ["backprop's epochs", "memory, MB"]
    lines = [f"### {NETWORKS[network]}\n", f"| {' | '.join(header)} |", "|---" + "|--:" * (len(header) - 1) + "|"]
    for rule in rows:
        published = [peer.errors.get(rule, "") for peer in peers]
        cells = _cells(column, runs.get(names[rule], ()), runs.get(names["bp"], ()))
        lines.append(f"| {' | '.join([FIELD[rule], *published, *cells])} |")
    return "\n".join(lines)


def _known(name: str, rule: str, recipes: Mapping[str, Recipe], peers: Sequence[Peer]) -> bool:
    return name in recipes or any(rule in peer.errors for peer in peers)


def _cells(column: str, runs: Sequence[Result], backprop: Sequence[Result]) -> list[str]:
    if not runs:
        return ["not yet run", *[""] * 5]
    about = BENCHMARKS[column]
    validated = Summary.of([run.after(run.protocol_epochs).value for run in runs])
    lucky = Summary.of([best_test(run.history, run.metric, run.protocol_epochs).value for run in runs])
    held = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    seconds = statistics.median(run.seconds_per_epoch for run in runs)
    return [
        figure_text(validated.mean, validated.std, about),
        figure_text(lucky.mean, lucky.std, about),
        str(validated.seeds),
        f"{seconds:.3g}",
        _ratio(runs, backprop),
        f"{statistics.median(held) / 1e6:.0f}" if held else "",
    ]


def _ratio(runs: Sequence[Result], backprop: Sequence[Result]) -> str:
    """Seconds an epoch in backprop's, where both ran on the same kind of machine."""
    places: dict[tuple[str, int], tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for which, those in enumerate((runs, backprop)):
        for run in those:
            places[run.device, run.threads][which].append(run.seconds_per_epoch)
    ratios = [
        statistics.median(ours) / statistics.median(theirs) for ours, theirs in places.values() if ours and theirs
    ]
    return f"{ratios[0]:.2g}" if ratios else ""
