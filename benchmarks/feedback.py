"""What does a feedback update cost, and how much of a sampled one is signal?

A feedback update is the forward pass as far as the output and one step of feedback learning, its Adam included;
"simulated" is the straightforward way to draw, unit by unit and step by step; "without closed forms" is for the same
network treated as one of any shape. The second table takes one batch of a fixed network and compares single draws of
``Sampled`` with ``Expected``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import harness
import torch
from problems import Problem, Settings, add_sizes
from reference import Reference
from torch import Tensor

from dfc_lightning import FeedbackLearner, Sampled
from dfc_lightning.feedback_learning.method import FeedbackMethod


class Simulated(Sampled):
    """``Sampled`` whose draws are simulations."""

    draw = Sampled.gradient


def methods(settings: Settings) -> dict[str, FeedbackMethod]:
    """The recipe's sampled feedback learning, also by simulation, and its expectation."""
    name = f"Sampled, {settings.sampled.steps} steps"
    simulated = Simulated(**asdict(settings.sampled))
    return {name: settings.sampled, f"{name}, simulated": simulated, "Expected": settings.expected}


def feedback_update(problem: Problem, settings: Settings, method: FeedbackMethod) -> Callable[[], Any]:
    """A call that takes one feedback learning step."""
    learner = FeedbackLearner(problem.network, replace(settings.feedback, method=method))
    return lambda: learner.step(problem.network.observe(problem.x))


def signal(problem: Problem, settings: Settings, draws: int) -> dict[str, Any]:
    """Single sampled gradients of one batch against the expected one; all layers taken together.

    Returns:
        ``cosines`` of the draws, ``noise`` as the root mean square of ‖g − E g‖ / ‖E g‖, and ``mean_distance``, that of
        the mean over the draws, beside ``mean_distance_by_chance`` = noise / √draws.
    """
    forward = problem.network.observe(problem.x)
    generator = torch.Generator(problem.x.device).manual_seed(0)

    def noise(shape: tuple[int, int]) -> Tensor:
        return torch.randn(shape, generator=generator, device=problem.x.device, dtype=problem.x.dtype)

    def flat(method: FeedbackMethod) -> Tensor:
        return torch.cat([g.flatten() for g in method.draw(forward, noise)]).double()

    mean = flat(settings.expected)
    samples = torch.stack([flat(settings.sampled) for _ in range(draws)])
    cosines = samples @ mean / (samples.norm(dim=1) * mean.norm())
    relative = float((samples - mean).square().sum(1).mean().sqrt() / mean.norm())
    return {
        "cosine": statistics.median(cosines.tolist()),
        "noise": relative,
        "mean_distance": float((samples.mean(0) - mean).norm() / mean.norm()),
        "mean_distance_by_chance": relative / draws**0.5,
        "cosines": cosines.tolist(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = harness.arguments(__doc__, repeats=20)
    add_sizes(parser)
    parser.add_argument("--recipe", default="mnist/dfc_ss", help="whose network and phase; or mnist_autoencoder/dfc_ss")
    parser.add_argument("--draws", default=100, type=int, help="sampled gradients to compare with the expected one")
    parser.add_argument("--reference", type=Path, help="a checkout of the authors' implementation, timed without Adam")
    options = harness.parse(parser, argv)
    settings, where = Settings.load(options.recipe, options), (options.batch, options.dtype, options.device)
    plain = settings.problem(*where)

    starts = {"random Q": settings.feedback_init, "Q from weight products": "weight_product"}
    signals = {name: signal(settings.problem(*where, start), settings, options.draws) for name, start in starts.items()}

    calls: dict[str, Callable[[], Any]] = {"backprop": lambda: plain.update(None)}
    for name, method in methods(settings).items():
        calls[name] = feedback_update(settings.problem(*where, settings.feedback_init), settings, method)
    recorded = settings.problem(*where, settings.feedback_init).recorded()
    calls["Expected, without closed forms"] = feedback_update(recorded, settings, settings.expected)
    if options.reference is not None:
        theirs = Reference(options.reference, settings, settings.problem(*where, settings.feedback_init))
        calls["Sampled, authors' code"] = theirs.feedback_update
    times = harness.interleave(calls, options.repeats, options.device)
    costs: dict[str, Any] = {
        name: {
            "ms": harness.milliseconds(times, name),
            "ratio": harness.ratio(times, name, "backprop"),
            "seconds": seconds,
        }
        for name, seconds in times.items()
    }

    text = harness.table(("feedback update", "ms", "× backprop"), [(n, c["ms"], c["ratio"]) for n, c in costs.items()])
    columns = ("cosine", "noise", "mean_distance", "mean_distance_by_chance")
    header = ("one sampled batch", "cosine", "noise / signal", f"mean of {options.draws}", "by chance")
    text += "\n\n" + harness.table(header, [(name, *(found[c] for c in columns)) for name, found in signals.items()])
    harness.report("feedback", options, {"updates": costs, "signals": signals}, text)

    def draw(axes: Any) -> None:
        harness.bars(axes[0], {name: cost["ratio"] for name, cost in costs.items()}, "time, in backprop steps")
        for name, found in signals.items():
            axes[1].hist(found["cosines"], bins=20, alpha=0.6, label=name)
        axes[1].set(xlabel="cosine of one sampled batch gradient to the expected one", ylabel="draws")
        axes[1].legend(frameon=False)

    harness.figure("feedback", options, 1, 2, draw)


if __name__ == "__main__":
    main()
