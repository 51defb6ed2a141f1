"""Validation error over epochs of finished runs, as a figure and a Markdown table with the test figures.

python benchmarks/learning_curves.py runs/mnist/*/version_0 --out docs/mnist.png
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAMES = {
    "bp": "backprop",
    "dfa": "DFA",
    "dfc": "DFC",
    "dfc_ss": "DFC-SS",
    "dfc_ssa": "DFC-SSA",
    "dfc_ss_fixed": "DFC-SS, fixed feedback",
}


def column(run: Path, name: str) -> dict[int, float]:
    """The logged values of a metric by epoch."""
    with (run / "metrics.csv").open() as file:
        return {int(row["epoch"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders that hold a metrics.csv")
    parser.add_argument("--metric", default="error", help="what to compare (default: error)")
    parser.add_argument("--out", type=Path, default=Path("runs/learning_curves.png"), help="the figure")
    options = parser.parse_args()
    runs = {run.parent.name: run for run in options.runs}
    figure, axes = plt.subplots(figsize=(6.4, 3.6), constrained_layout=True)
    print(f"| recipe | epochs | best validation {options.metric} (epoch) | test {options.metric} |\n|---|--:|--:|--:|")
    for name in sorted(runs, key=lambda name: [*NAMES, name].index(name)):
        validation = column(runs[name], f"val/{options.metric}")
        (test,) = column(runs[name], f"test/{options.metric}").values()
        best = min(validation, key=lambda epoch: validation[epoch])
        print(f"| {NAMES.get(name, name)} | {len(validation)} | {validation[best]:.2f} ({best}) | {test:.2f} |")
        axes.plot([epoch + 1 for epoch in validation], validation.values(), marker="o", label=NAMES.get(name, name))
    axes.set(xlabel="epoch", ylabel=f"validation {options.metric}" + (", %" if options.metric == "error" else ""))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes.legend()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=160)


if __name__ == "__main__":
    main()
