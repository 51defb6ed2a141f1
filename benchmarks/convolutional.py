"""What do an update and a feedback step cost on convolutional networks, in units of a backprop step of the same one?

An update is forward pass, loss and ``backward()`` with ``.grad`` written; no optimizer. A feedback step is the forward
pass as far as the output and one step of feedback learning, its Adam included. The networks have had a few steps of
backprop on synthetic images with classes; feedback weights start from their Jacobians.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import harness
import torch
import torch.nn.functional as F
from problems import Problem
from torch import Tensor, nn

from dfc_lightning import (
    DFA,
    DFC,
    Backprop,
    ControlledNetwork,
    Expected,
    FeedbackLearner,
    FeedbackLearning,
    LearningRule,
    Sampled,
)
from dfc_lightning.models import LeNet, ResNet
from dfc_lightning.settling import Linearized, SteadyState

RULES: dict[str, LearningRule | None] = {
    "backprop": None,
    "Backprop()": Backprop(),
    "DFA()": DFA(),
    "DFC-SSA": DFC(settling=Linearized()),
    "DFC-SS, rtol 1e-3": DFC(settling=SteadyState(rtol=1e-3)),
    "DFC-SS, rtol 1e-5": DFC(settling=SteadyState(rtol=1e-5)),
}
LEARNING = {
    "feedback, Expected": FeedbackLearning(Expected()),
    "feedback, Expected, every 8th sample": FeedbackLearning(Expected(gated=True), every_nth_sample=8),
    "feedback, Sampled": FeedbackLearning(Sampled()),
}


def images(shape: tuple[int, ...], options: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless seeded batches of noisy images, one coarse pattern a class."""
    g = torch.Generator().manual_seed(1)
    patterns = F.interpolate(torch.randn(10, shape[0], 4, 4, generator=g), shape[1:], mode="bilinear")
    while True:
        labels = torch.randint(10, (options.batch,), generator=g)
        x = patterns[labels] + torch.randn(options.batch, *shape, generator=g)
        yield x.to(options.device, options.dtype), labels.to(options.device)


def problem(module: nn.Module, shape: tuple[int, ...], options: argparse.Namespace) -> Problem:
    """A network after a few steps of backprop, a batch, and feedback weights."""
    module = module.to(options.device, options.dtype)
    optimizer, batches = torch.optim.Adam(module.parameters(), lr=1e-3), images(shape, options)
    for _, (x, y) in zip(range(options.train_steps), batches):
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
    x, y = next(batches)
    network = ControlledNetwork(module, seed=0)
    network.observe(x)  # finds the points and the first feedback weights: not part of later passes
    return Problem(network, x, y, F.cross_entropy)


def feedback_step(of: Problem, learning: FeedbackLearning) -> Callable[[], Any]:
    """A call that takes one feedback learning step; the feedback weights of ``of`` stay as they are."""
    network = ControlledNetwork(of.network.module, seed=0)
    network.load_state_dict(of.network.state_dict())
    learner = FeedbackLearner(network, learning)
    return lambda: learner.step(network.observe(of.x))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = harness.arguments(__doc__, repeats=5)
    parser.add_argument("--batch", default=128, type=int, help="batch size")
    parser.add_argument("--blocks", default=1, type=int, help="blocks of each of the ResNet's three stages")
    parser.add_argument("--train-steps", default=20, type=int, help="steps of backprop before")
    options = harness.parse(parser, argv)
    nets: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
        "LeNet": (LeNet(), (1, 28, 28)),
        f"ResNet-{6 * options.blocks + 2}": (ResNet(blocks=options.blocks), (3, 32, 32)),
    }
    results: dict[str, dict[str, Any]] = {}
    for net, (module, shape) in nets.items():
        of = problem(module, shape, options)
        settled = {name: of.update(rule) for name, rule in RULES.items()}
        calls = {name: (lambda rule=rule, of=of: of.update(rule)) for name, rule in RULES.items()}
        calls |= {name: feedback_step(of, learning) for name, learning in LEARNING.items()}
        times = harness.interleave(calls, options.repeats, options.device)
        for name in calls:
            end = settled.get(name)
            results[f"{net}: {name}"] = {
                "ms": harness.milliseconds(times, name),
                "ratio": harness.ratio(times, name, "backprop"),
                "residual": None if end is None else float(end.residual.max()),
                "converged": None if end is None else float(end.converged.double().mean()),
                "iterations": None if end is None else int(end.iterations),
                "seconds": times[name],
            }
    columns = ("ms", "ratio", "residual", "converged", "iterations")
    text = harness.table(
        ("update", "ms", "× backprop", "worst residual", "converged", "iterations"),
        [(name, *(result[c] for c in columns)) for name, result in results.items()],
    )
    harness.report("convolutional", options, {"updates": results}, text)
    ratios = {name: result["ratio"] for name, result in results.items()}
    harness.figure("convolutional", options, 1, 1, lambda axes: harness.bars(axes, ratios, "time, in backprop steps"))


if __name__ == "__main__":
    main()
