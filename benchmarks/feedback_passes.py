"""In how many passes over the data does the feedback come to track the network, by sampled and by expected updates?

The autoencoder, whose depth and narrow middle make feedback weights matter most, is trained a little by backprop and
then held. Its feedback weights start at random and learn at the recipe's rate. Of the hidden layers, in the range of
the output weights, in which alone they move the output, it is measured how much of Q lies in the row space of J
(Condition 2) and the angle of Q to the damped pseudoinverse of J, to which Theorem 6 has it turn.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import harness
import torch
from problems import Problem, Settings, add_sizes

from dfc_lightning import FeedbackLearner
from dfc_lightning.feedback_learning.method import FeedbackMethod
from dfc_lightning.metrics import condition_two, feedback_angle
from dfc_lightning.passes.dense import as_dense

LOOKED_AT = 16
"""Samples whose J the feedback weights are compared with."""


def tracking(problem: Problem, damping: float) -> dict[str, float]:
    """Condition 2 and the angle to the damped pseudoinverse, of the hidden layers and of each of them."""
    forward = as_dense(problem.network.observe(problem.x[:LOOKED_AT]), "A basis of the range of W_L", "Take an MLP.")
    if forward.reducible:
        forward, _ = forward.reduced()
    jacobians, feedback = forward.jacobians()[:-1], list(forward.feedback[:-1])
    jacobian, stacked = torch.cat(jacobians, dim=2).double(), torch.cat(feedback).double()
    found = {
        "condition 2": float(condition_two(stacked, jacobian)),
        "angle": float(feedback_angle(stacked, jacobian, damping=damping)),
    }
    pseudoinverse = (
        jacobian.mT @ torch.linalg.pinv(jacobian @ jacobian.mT + damping * torch.eye(len(jacobian[0])))
    ).mean(0)
    hidden = forward.widths[:-1]
    for i, (q, best) in enumerate(zip(stacked.split(hidden), pseudoinverse.split(hidden)), start=1):
        cosine = (q * best).sum() / (q.norm() * best.norm())
        found[f"angle {i}"] = float(torch.rad2deg(torch.acos(cosine.clamp(-1, 1))))
    return found


def learned(problem: Problem, settings: Settings, method: FeedbackMethod, options: Any) -> list[dict[str, float]]:
    """The tracking before the first and after each pass, and the seconds a pass took."""
    rate = options.rate * (settings.feedback.initial_lr or settings.feedback.lr)
    learner = FeedbackLearner(problem.network, replace(settings.feedback, method=method, initial_lr=rate))
    batches = settings.batches(options.batch, options.dtype, options.device)
    rows = [{"seconds": 0.0, **tracking(problem, options.damping)}]
    for _ in range(options.passes):
        start = time.perf_counter()
        for _, (x, _) in zip(range(options.batches), batches):
            learner.step(problem.network.observe(x), initial=True)
        seconds = time.perf_counter() - start
        rows.append({"seconds": seconds, **tracking(problem, options.damping)})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = harness.arguments(__doc__, repeats=1)
    add_sizes(parser)
    parser.add_argument("--train-steps", default=400, type=int, help="steps of backprop before")
    parser.add_argument("--batches", default=430, type=int, help="batches a pass")
    parser.add_argument("--passes", default=15, type=int, help="passes over the data")
    parser.add_argument(
        "--rate", default=1.0, type=float, help="learning rate in units of the recipe's for these passes"
    )
    parser.add_argument("--start", default=1.0, type=float, help="size of the first Q in units of the recipe's")
    parser.add_argument("--damping", default=0.1, type=float, help="γ of the pseudoinverse")
    options = harness.parse(parser, argv)
    settings = Settings.load("mnist_autoencoder/dfc_ss", options)

    def fresh() -> Problem:
        problem = settings.problem(options.batch, options.dtype, options.device, settings.feedback_init)
        optimizer = torch.optim.Adam(problem.network.module.parameters(), lr=1e-3)
        batches = settings.batches(options.batch, options.dtype, options.device)
        for _, (x, y) in zip(range(options.train_steps), batches):
            replace(problem, x=x, y=y).update(None)
            optimizer.step()
        for q in problem.network.feedback[:-1]:
            q.data *= options.start
        return problem

    methods: dict[str, FeedbackMethod] = {"Expected": settings.expected, "Sampled": settings.sampled}
    results = {name: learned(fresh(), settings, method, options) for name, method in methods.items()}
    columns = list(results["Sampled"][0])
    header = ("method", "pass", *columns)
    rows = [(name, k, *(row[c] for c in columns)) for name, found in results.items() for k, row in enumerate(found)]
    harness.report("feedback_passes", options, {"passes": results}, harness.table(header, rows))

    def draw(axes: Any) -> None:
        for name, found in results.items():
            axes[0].plot([row["condition 2"] for row in found], marker=".", label=name)
            axes[1].plot([row["angle"] for row in found], marker=".", label=name)
        axes[0].set(xlabel="passes", ylabel="share of Q in the row space of J")
        axes[1].set(xlabel="passes", ylabel="angle of Q to the pseudoinverse of J, degrees")
        axes[0].legend(frameon=False)

    harness.figure("feedback_passes", options, 1, 2, draw)


if __name__ == "__main__":
    main()
