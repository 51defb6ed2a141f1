"""A callback that tells, before anything is learned, what is under control and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelSummary, RichModelSummary
from lightning.pytorch.utilities.model_summary import get_human_readable_count

from dfc_lightning.errors import require
from dfc_lightning.network.controlled_network import LISTED_UP_TO, ControlledNetwork
from dfc_lightning.network.learning_rule import Layerwise
from dfc_lightning.network.summary import PointSummary, times
from dfc_lightning.passes.forward_pass import ForwardPass
from dfc_lightning.training.price import price

if TYPE_CHECKING:
    from dfc_lightning.training.controlled import ControlledTraining

Columns = list[tuple[str, list[str]]]


class ControlSummary(Callback):
    """Prints a summary of the control points, as Lightning's ``ModelSummary`` does of the modules.

    It comes with the first forward pass, which shows the order of the layers and the shapes of voltages, before an
    update is made of it: for each point its layer, its voltage, its parameters, how feedback reaches it and by how
    many weights. Below stand who teaches what, the numbers of feedback weights, which are no parameters of the module
    and are not in ``ModelSummary``, their memory with their optimizer's, and the price of a step in steps of
    ``Backprop()``, measured on the batch where such a step is short. The strategies add it to a Trainer that has a
    ``ModelSummary``; ``enable_model_summary=False`` leaves both away.

    Args:
        max_points: networks of more points have one line instead of the table; 0 for one line in any case.
        measure_price: whether to measure the price, which takes some updates.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[ControlSummary(max_points=100)], logger=False, enable_checkpointing=False)
    """

    def __init__(self, max_points: int = LISTED_UP_TO, measure_price: bool = True) -> None:
        require(max_points >= 0, "max_points", max_points, "give zero or more")
        self.max_points, self.measure_price = max_points, measure_price

    def show(self, strategy: ControlledTraining, network: ControlledNetwork, forward: ForwardPass) -> None:
        """Print the summary.

        Args:
            strategy: what trains.
            network: the controlled network, whose structure is known.
            forward: its first pass, bound to the feedback weights.
        """
        module = strategy.lightning_module
        assert module is not None
        costs = price(strategy.rule, forward, strategy.learner) if self.measure_price else None
        rows, facts = network.summary(), facts_of(strategy, network, costs)
        if not module.trainer.is_global_zero:
            return
        if len(rows) > self.max_points:
            module.print(
                f"{len(rows)} control points: " + "; ".join(f"{what} {figure.strip()}" for figure, what in facts)
            )
        elif any(isinstance(each, RichModelSummary) for each in module.trainer.callbacks):  # type: ignore[attr-defined]
            _print_rich(columns_of(rows), facts)
        else:
            module.print("\n" + table(columns_of(rows), facts))


def with_summary(trainer: pl.Trainer) -> None:
    """Give a trainer that has a ``ModelSummary`` one of the control points too."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    found = [i for i, each in enumerate(callbacks) if isinstance(each, ModelSummary)]
    if found and not any(isinstance(each, ControlSummary) for each in callbacks):
        callbacks.insert(found[0] + 1, ControlSummary())


def columns_of(rows: Sequence[PointSummary]) -> Columns:
    """The columns of the table, each with its title."""
    columns = [
        (" ", [str(i) for i in range(len(rows))]),
        ("Control point", [row.name for row in rows]),
        ("Type", [row.type for row in rows]),
        ("Voltage", [times(row.voltage) for row in rows]),
        ("Params", [get_human_readable_count(row.parameters) for row in rows]),
    ]
    if any(row.shape for row in rows):
        columns.append(("Feedback", [row.feedback or "none" for row in rows]))
        columns.append(("Shape", [times(row.shape, "") for row in rows]))
        columns.append(("Feedback weights", [get_human_readable_count(row.feedback_weights) for row in rows]))
    return columns


def facts_of(
    strategy: ControlledTraining, network: ControlledNetwork, costs: float | None = None
) -> list[tuple[str, str]]:
    """What stands below the table: figures, and what they are of."""
    module = strategy.lightning_module
    assert module is not None
    rule, learning = strategy.rule, strategy.learning
    ours = {id(p) for p in network.parameters}
    taught = sum(p.numel() for p in network.parameters if p.requires_grad)
    rest = sum(p.numel() for p in module.parameters() if p.requires_grad and id(p) not in ours)
    facts = [(get_human_readable_count(taught), f"Params taught by {type(rule).__name__}")]
    if rest:
        facts.append((get_human_readable_count(rest), "Params outside, left to autograd"))
    weights = network.feedback
    if weights:
        count = sum(q.numel() for q in weights)
        facts.append((get_human_readable_count(count), f"Feedback weights, {_learned_how(strategy)}"))
        size = sum(q.numel() * q.element_size() for q in weights)
        optimizer = 2 * size if learning is not None and learning.has_steps and learning.optimizer == "adam" else 0
        facts.append((f"{(size + optimizer) / 1e6:,.3f}", "Feedback size (MB), with its optimizer"))
    if costs is not None:
        facts.append((f"{costs:.2g}", "Time of an update, in updates by Backprop()"))
    return facts


def _learned_how(strategy: ControlledTraining) -> str:
    kind, learning = strategy.rule.feedback, strategy.learning
    ways = []
    if learning is not None and learning.has_steps:
        ways.append(f"learned by {type(learning.method).__name__}")
    if isinstance(kind, Layerwise) and kind.tracking is not None:
        ways.append("tracking the optimizer")
    meant = kind is not None and kind.learned
    return ", then ".join(ways) or ("fixed, unless the rule teaches them" if meant else "fixed")


def table(columns: Columns, facts: Sequence[tuple[str, str]]) -> str:
    """The summary as text."""
    widths = [max(map(len, [title, *cells])) for title, cells in columns]
    header = " | ".join(f"{title:<{width}}" for (title, _), width in zip(columns, widths))
    lines = [header, "-" * len(header)]
    for row in zip(*(cells for _, cells in columns)):
        lines.append(" | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)))
    lines.append("-" * len(header))
    return "\n".join([*(line.rstrip() for line in lines), *(f"{figure:<10}{what}" for figure, what in facts)])


def _print_rich(columns: Columns, facts: Sequence[tuple[str, str]]) -> None:
    from rich import get_console
    from rich.table import Table

    drawn = Table(*(title for title, _ in columns), header_style="bold magenta")
    for row in zip(*(cells for _, cells in columns)):
        drawn.add_row(*row)
    get_console().print(drawn)
    for figure, what in facts:
        get_console().print(f"[bold]{what}[/]: {figure}", highlight=False)
