"""The page that holds our results against the published ones."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from dfc_lightning.experiments.benchmark_page import benchmark
from dfc_lightning.experiments.figures import Curves
from dfc_lightning.experiments.ledger import Result, longest
from dfc_lightning.experiments.protocol import median_of_last
from dfc_lightning.experiments.recipe import Recipe
from dfc_lightning.experiments.table import (
    BENCHMARKS,
    COLUMNS,
    FIELD,
    NETWORKS,
    RULE_OF_MARKS,
    RULES,
    Column,
    Summary,
    figure_text,
    mark,
)

REFERENCE_SECONDS = {"bp": 0.007, "dfa": 0.008, "dfc_ssa": 0.021, "dfc_ss": 3.3, "dfc": 7.2}
REFERENCE_FEEDBACK_SECONDS = 0.30
REFERENCE_AUTOENCODER_SSA_SECONDS = 14.0
"""The published code's seconds a batch of 128, in float64 on two cores."""


class Standing:
    """The results that count, a line a seed: for the table those of its recipes as they are, without overrides.

    Args:
        recipes: the recipes in the folders of the columns, the table's and the benchmark's, by name.
        results: all finished runs.
    """

    def __init__(self, recipes: Mapping[str, Recipe], results: Sequence[Result]) -> None:
        self.recipes = recipes
        ours = [r for r in results if r.recipe in recipes]
        current = [r for r in ours if r.fingerprint == _as_it_is(recipes[r.recipe], r.overrides).fingerprint]
        self.outdated = len(ours) - len(current)
        self.full: dict[str, list[Result]] = defaultdict(list)
        self.short: dict[tuple[str, int], list[Result]] = defaultdict(list)
        self.further: dict[tuple[str, tuple[str, ...], int], list[Result]] = defaultdict(list)
        self.field: dict[str, list[Result]] = defaultdict(list)
        for result in sorted(longest(current), key=lambda r: r.seed):
            whole = not result.overrides and result.epochs >= recipes[result.recipe].epochs
            if whole and result.recipe.split("/")[0] in BENCHMARKS:
                self.field[result.recipe].append(result)
            elif result.overrides or result.recipe.split("/")[1] not in RULES:
                self.further[result.recipe, tuple(result.overrides), result.epochs].append(result)
            elif result.epochs >= recipes[result.recipe].epochs:
                self.full[result.recipe].append(result)
            else:
                self.short[result.recipe, result.epochs].append(result)

    def summary(self, name: str) -> Summary | None:
        """Our figure for a cell, by the whole protocol."""
        epochs = self.recipes[name].epochs
        values = [result.after(epochs).value for result in self.full.get(name, [])]
        return Summary.of(values) if values else None

    def steady(self, name: str) -> Summary | None:
        """The median over the last ten epochs instead of the figure of one."""
        recipe = self.recipes[name]
        values = [median_of_last(run.history, recipe.metric, recipe.epochs) for run in self.full.get(name, [])]
        return Summary.of(values) if values else None

    def curves(self) -> dict[str, Curves]:
        """Validation figures over epochs, training losses where these are judged, in the columns' units."""
        panels: dict[str, Curves] = {}
        for column, about in COLUMNS.items():
            lines = {}
            for rule, title in RULES.items():
                name = f"{column}/{rule}"
                runs = self.full.get(name) or [r for (n, _), rs in self.short.items() if n == name for r in rs]
                if runs:
                    lines[title] = [[figure / about.scale for figure in _validated(run)] for run in runs]
            if lines:
                panels[about.title.replace("test", "validation")] = lines
        for column, about in BENCHMARKS.items():
            for network, named in NETWORKS.items():
                names = {title: f"{column}/{network}_{rule}" for rule, title in FIELD.items()}
                lines = {
                    title: [_validated(run) for run in self.field[name]]
                    for title, name in names.items()
                    if name in self.field
                }
                if lines:
                    panels[f"{named}, {about.title.replace('test', 'validation')}"] = lines
        return panels


def _validated(run: Result) -> list[float]:
    """A run's figures of every epoch, on validation samples."""
    return run.history[run.metric.replace("test/", "val/", 1)]


def page(standing: Standing, figure: str | None) -> str:
    """The page, in Markdown.

    Args:
        standing: what counts.
        figure: the learning curves' image, as the page is to link it.
    """
    parts = [
        "# Results\n\n*Written by `dfc report`; do not edit by hand.*\n\n"
        "Ours beside Table 1 of Meulemans et al. (2021): mean ± standard deviation over seeds, at the epoch of best "
        f"validation; training losses at the last epoch. {RULE_OF_MARKS}"
    ]
    parts += [_column(standing, name, about) for name, about in COLUMNS.items()]
    parts += [part for column in BENCHMARKS if (part := benchmark(column, standing.recipes, standing.field))]
    if figure:
        parts.append(
            f"## Learning curves\n\nMeans over seeds, the range over seeds shaded.\n\n![Learning curves]({figure})"
        )
    if standing.short:
        parts.append(_short(standing))
    if standing.further:
        parts.append(_further(standing))
    if standing.full or standing.short:
        parts.append(_cost(standing))
    if standing.outdated:
        parts.append(f"{standing.outdated} runs of earlier versions of the recipes are left out.")
    return "\n\n".join(parts) + "\n"


def _column(standing: Standing, column: str, about: Column) -> str:
    last = column == "mnist_train_loss"
    lines = [
        f"## {about.title}\n",
        f"| rule | published | ours | seeds | |{' ours, median of the last ten epochs |' if last else ''}",
        f"|---|--:|--:|--:|---|{'--:|' if last else ''}",
    ]
    for rule, title in RULES.items():
        recipe = standing.recipes.get(f"{column}/{rule}")
        if recipe is None or recipe.expected is None:
            continue
        ours, published = standing.summary(recipe.name), recipe.expected
        said = figure_text(published.mean, published.std, about)
        cells = ["", ""] if ours is None else [figure_text(ours.mean, ours.std, about), str(ours.seeds)]
        line = f"| {title} | {said} | {cells[0]} | {cells[1]} | {mark(ours, published)} |"
        if last:
            steady = standing.steady(recipe.name)
            line += f" {figure_text(steady.mean, steady.std, about) if steady else ''} |"
        lines.append(line)
    return "\n".join(lines)


def _short(standing: Standing) -> str:
    lines = [
        "## Runs of fewer epochs\n\nNot comparable with the published figures, which are of the whole protocol.\n",
        "| cell | epochs | ours so far | seeds | published, whole protocol |",
        "|---|--:|--:|--:|--:|",
    ]
    for (name, epochs), runs in sorted(standing.short.items(), key=lambda item: _order(item[0][0])):
        about, recipe = COLUMNS[name.split("/")[0]], standing.recipes[name]
        ours = Summary.of([run.value for run in runs])
        published = figure_text(recipe.expected.mean, recipe.expected.std, about) if recipe.expected else ""
        part = f"{epochs} of {recipe.epochs}"
        said = figure_text(ours.mean, ours.std, about)
        lines.append(f"| {_titled(name)} | {part} | {said} | {ours.seeds} | {published} |")
    return "\n".join(lines)


def _further(standing: Standing) -> str:
    lines = [
        "## Beyond the published table\n\nOther recipes, and recipes with other settings (`dfc reproduce --set`).\n",
        "| recipe | with | epochs | ours | seeds | seconds an epoch |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for (name, overrides, epochs), runs in sorted(standing.further.items()):
        ours = Summary.of([run.value for run in runs])
        said = figure_text(ours.mean, ours.std, (COLUMNS | BENCHMARKS)[name.split("/")[0]])
        settings = ", ".join(f"`{override}`" for override in overrides)
        seconds = statistics.median(run.seconds_per_epoch for run in runs)
        lines.append(f"| `{name}` | {settings} | {epochs} | {said} | {ours.seeds} | {seconds:.3g} |")
    return "\n".join(lines)


def _cost(standing: Standing) -> str:
    lines = [
        "## Cost\n\nWall time of the median epoch and run, feedback passes, validation and test included, beside the "
        "published code's measured seconds for a batch of 128 (float64, two cores). A batch of its feedback learning, "
        f"of which an epoch has three passes, takes {REFERENCE_FEEDBACK_SECONDS:.2f} s more where feedback is "
        "learned. An epoch has 430 batches.\n",
        "| cell | seconds an epoch | seconds a run | epochs | on | published code, seconds a batch |",
        "|---|--:|--:|--:|---|--:|",
    ]
    groups: dict[tuple[str, int, str], list[Result]] = defaultdict(list)
    for runs in [*standing.full.values(), *standing.short.values()]:
        for run in runs:
            groups[run.recipe, run.epochs, f"{run.device}, {run.threads} threads"].append(run)
    for (name, epochs, place), runs in sorted(groups.items(), key=lambda item: _order(item[0][0])):
        epoch = statistics.median(run.seconds_per_epoch for run in runs)
        whole = statistics.median(run.seconds for run in runs)
        lines.append(f"| {_titled(name)} | {epoch:.3g} | {whole:.4g} | {epochs} | {place} | {_reference(name)} |")
    return "\n".join(lines)


def _reference(name: str) -> str:
    column, rule = name.split("/")
    base = rule.removesuffix("_fixed")
    if column == "mnist_autoencoder":
        return f"{REFERENCE_AUTOENCODER_SSA_SECONDS:g}" if base == "dfc_ssa" else ""
    return f"{REFERENCE_SECONDS[base]:g}"


def _as_it_is(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    return Recipe.load(recipe.path, overrides) if overrides else recipe


def _order(name: str) -> tuple[int, int]:
    column, rule = name.split("/")
    return list(COLUMNS).index(column), list(RULES).index(rule)


def _titled(name: str) -> str:
    column, rule = name.split("/")
    return f"{COLUMNS[column].title.split(', ')[0]}{' (training loss)' if 'train' in column else ''}, {RULES[rule]}"
