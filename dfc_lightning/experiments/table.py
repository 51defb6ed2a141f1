"""The published table: its columns and rows, and how a cell of ours compares with its."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dfc_lightning.experiments.published import Published


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Args:
        title: its heading.
        scale: its figures are given in units of this.
        digits: after the point.
    """

    title: str
    scale: float = 1.0
    digits: int = 2


COLUMNS = {
    "mnist": Column("MNIST, test error, %"),
    "fashion_mnist": Column("Fashion-MNIST, test error, %"),
    "mnist_autoencoder": Column("MNIST autoencoder, test loss, 10⁻²", 1e-2),
    "mnist_train_loss": Column("MNIST, training loss, 10⁻⁷", 1e-7),
}
"""The table's columns by the folder of their recipes."""

RULES = {
    "bp": "BP",
    "dfa": "DFA",
    "dfc_ssa": "DFC-SSA",
    "dfc_ss": "DFC-SS",
    "dfc": "DFC",
    "dfc_ssa_fixed": "DFC-SSA (fixed)",
    "dfc_ss_fixed": "DFC-SS (fixed)",
    "dfc_fixed": "DFC (fixed)",
}
"""The table's rows by the names of their recipes."""

BENCHMARKS = {
    "cifar10": Column("CIFAR-10, test error, %"),
    "cifar10_short": Column("CIFAR-10 in ten epochs, test error, %"),
    "text": Column("Python's documentation by characters, test loss, nats", digits=3),
}
"""Columns of the field's benchmark by the folder of their recipes, whose names are network_rule."""

NETWORKS = {"vgg5": "VGG-5", "resnet8": "ResNet-8", "resnet20": "ResNet-20", "vit": "ViT", "gpt": "GPT"}
"""Its networks."""

FIELD = {
    "bp": "BP",
    "dfc_layered": "DFC, layered feedback",
    "dfc": "DFC-SS, direct feedback",
    "kolen_pollack": "Kolen-Pollack",
    "weight_mirror": "weight mirror",
    "sign_symmetry": "sign symmetry (uSF)",
    "fa": "FA",
    "dfa": "DFA",
    "least_control": "least control",
    "predictive_coding": "predictive coding",
    "predictive_coding_centred": "predictive coding, centred",
    "dual_propagation": "dual propagation",
}
"""Its rules, in the order of its rows."""

Mark = Literal["reproduced", "better", "worse", "not yet run"]

RULE_OF_MARKS = (
    "A cell is *reproduced* if our mean lies within two standard errors of the published one, else *better* or "
    "*worse*. The standard error is S √(1/n + 1/N), of our n seeds and the N published ones, both with the published "
    "standard deviation S: a wider spread of ours excuses nothing."
)


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation of some runs' figures.

    Args:
        mean: the mean.
        std: the sample standard deviation; None for one seed.
        seeds: their number.
    """

    mean: float
    std: float | None
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Of one figure a seed."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def mark(ours: Summary | None, published: Published) -> Mark:
    """How our figure, of which less is better, compares with the published one; see ``RULE_OF_MARKS``."""
    if ours is None:
        return "not yet run"
    error = published.std * math.sqrt(1 / ours.seeds + 1 / published.seeds)
    if abs(ours.mean - published.mean) <= 2 * error:
        return "reproduced"
    return "better" if ours.mean < published.mean else "worse"  # not a number is worse


def figure_text(mean: float, std: float | None, column: Column) -> str:
    """``2.29 ± 0.10`` in the column's units."""
    text = f"{mean / column.scale:.{column.digits}f}"
    return text if std is None else f"{text} ± {std / column.scale:.{column.digits}f}"
