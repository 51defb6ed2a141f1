"""What does one whole update cost, in units of a backprop step of the same network, batch and dtype?

A row is forward pass, loss and ``backward()`` with ``.grad`` written; no optimizer. Rows named "trained" have weights
and feedback weights from a brief training by DFC-SS on synthetic data with classes. Rows named "without closed forms"
are of the same network and feedback weights, treated as a network of any shape.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import harness
import reference
from problems import Problem, Settings, add_sizes

from dfc_lightning import DFA, Backprop, LearningRule, MinimumNorm
from dfc_lightning.settling import Euler, Linearized, SteadyState, Trajectory

WITHOUT = ", without closed forms"
PAPER_TIME: dict[str, Any] = {"dt": 0.02, "tau_ratio": 0.2}


@dataclass
class Row:
    """One method on one problem, and the backprop row that it is measured against."""

    name: str
    problem: Problem
    rule: LearningRule | None
    baseline: str
    slow: bool = False


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the rows."""
    add_sizes(parser)
    parser.add_argument("--train-steps", default=300, type=int, help="training steps behind the trained rows")
    parser.add_argument("--euler-steps", default=999, type=int, help="steps of the simulated update; 0 for none")


def rows(options: argparse.Namespace) -> list[Row]:
    """The rows of the table, on the paper's MNIST network and on its autoencoder."""
    steady, where = SteadyState(rtol=1e-5), (options.batch, options.dtype, options.device)
    mnist = Settings.load("mnist/dfc_ss", options)
    fresh, stepsize = mnist.problem(*where), mnist.target_stepsize
    trained = mnist.trained(mnist.problem(*where), options.train_steps)
    found = [
        Row("backprop", fresh, None, "backprop"),
        Row("Backprop()", fresh, Backprop(), "backprop"),
        Row("DFA()", mnist.problem(*where, "xavier_normal"), DFA(), "backprop"),
        Row("MinimumNorm()", fresh, MinimumNorm(target_stepsize=stepsize), "backprop"),
        Row("DFC-SSA", fresh, mnist.dfc(Linearized()), "backprop"),
        Row("DFC-SS", fresh, mnist.dfc(steady), "backprop"),
        Row("DFC-SS, trained", trained, mnist.dfc(steady), "backprop"),
    ]
    if options.euler_steps:
        simulated = Euler(options.euler_steps, **PAPER_TIME)
        name = f"DFC, {options.euler_steps} steps"
        found.append(Row(name, fresh, mnist.dfc(simulated, integrate=True), "backprop", slow=True))
    closed = Trajectory(steps=options.euler_steps or 999, **PAPER_TIME)
    found.append(Row("DFC, closed form", fresh, mnist.dfc(closed, integrate=True), "backprop"))
    found += [
        replace(row, name=row.name + WITHOUT, problem=row.problem.recorded())
        for row in found
        if row.name in ("Backprop()", "DFA()", "DFC-SSA", "DFC-SS")
    ]
    auto, base = Settings.load("mnist_autoencoder/dfc_ss", options), "autoencoder: backprop"
    fresh = auto.problem(*where)
    trained = auto.trained(auto.problem(*where), options.train_steps // 3)
    return found + [
        Row(base, fresh, None, base),
        Row("autoencoder: DFC-SSA", fresh, auto.dfc(Linearized()), base),
        Row("autoencoder: DFC-SS", fresh, auto.dfc(steady), base),
        Row("autoencoder: DFC-SS, trained", trained, auto.dfc(steady), base),
    ]


def theirs(options: argparse.Namespace) -> dict[str, reference.Reference]:
    """The same updates of the fresh network by the authors' implementation, if a checkout of it is named."""
    if options.reference is None:
        return {}
    settings = Settings.load("mnist/dfc_ss", options)
    problem = settings.problem(options.batch, options.dtype, options.device)
    found = reference.updates(options.reference, settings, problem)
    return {f"{name}, authors' code": each for name, each in found.items() if options.euler_steps or name == "DFC-SSA"}


def quality(row: Row) -> dict[str, Any]:
    """How exact a row's update is: worst residual, iterations, float32 against float64."""
    settled = row.problem.update(row.rule)
    found: dict[str, Any] = {"residual": None, "iterations": None, "float32_error": row.problem.float32_error(row.rule)}
    if settled is not None:
        found |= {"residual": float(settled.residual.max()), "iterations": int(settled.iterations)}
        found["converged"] = float(settled.converged.double().mean())
    return found


def distance_to_simulation(measured: Sequence[Row]) -> str:
    """How far the closed form of the integrated update is from the simulated one, where both are there."""
    by_name = {row.name.partition(", ")[2]: row for row in measured if row.name.startswith("DFC, ")}
    if len(by_name) < 2:
        return ""
    simulated, closed = (row.problem.gradient(row.rule) for row in by_name.values())
    far = float((closed - simulated).norm() / simulated.norm())
    return f"\nThe closed form differs from the simulated update by {far:.1e} of its norm."


def worth_of_closed_forms(times: harness.Times) -> str:
    """The time without the closed forms of dense chains, in units of that with them."""
    pairs = [(name, name + WITHOUT) for name in times if name + WITHOUT in times]
    found = ", ".join(f"{name} {harness.ratio(times, without, name):.2f}" for name, without in pairs)
    return f"\nWithout closed forms, times as long: {found}."


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = harness.arguments(__doc__, repeats=30)
    add_options(parser)
    parser.add_argument("--slow-repeats", default=3, type=int, help="rounds that the simulated update takes part in")
    parser.add_argument("--reference", type=Path, help="a checkout of the authors' implementation to put beside ours")
    options = harness.parse(parser, argv)
    measured, others = rows(options), theirs(options)
    qualities = {row.name: quality(row) for row in measured}
    calls = {row.name: (lambda row=row: row.problem.update(row.rule)) for row in measured}
    calls |= {name: other.update for name, other in others.items()}
    slow = [row.name for row in measured if row.slow] + [name for name in others if not name.startswith("DFC-SSA")]
    rounds = dict.fromkeys(slow, min(options.slow_repeats, options.repeats))
    times = harness.interleave(calls, options.repeats, options.device, rounds)
    baselines = {row.name: row.baseline for row in measured}
    results = {
        name: {
            "ms": harness.milliseconds(times, name),
            "ratio": harness.ratio(times, name, baselines.get(name, "backprop")),
            **qualities.get(name, {}),
            "seconds": times[name],
        }
        for name in calls
    }
    columns = ("ms", "ratio", "residual", "iterations", "float32_error")
    text = harness.table(
        ("update", "ms", "× backprop", "worst residual", "iterations", "float32 error"),
        [(name, *(result.get(c) for c in columns)) for name, result in results.items()],
    )
    remarks = distance_to_simulation(measured) + worth_of_closed_forms(times)
    note = f"Trained: {options.train_steps} steps (autoencoder {options.train_steps // 3}) on synthetic data, seeded."
    harness.report("settling", options, {"updates": results}, f"{text}\n\n{note}{remarks}")
    ratios = {name: result["ratio"] for name, result in results.items()}
    harness.figure("settling", options, 1, 1, lambda axes: harness.bars(axes, ratios, "time, in backprop steps"))


if __name__ == "__main__":
    main()
