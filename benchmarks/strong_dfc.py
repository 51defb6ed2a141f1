"""What does an update of Strong-DFC cost, in units of a backprop step of the same network, batch and dtype?

The network and feedback weights of the recipe mnist/dfc_ss, random feedback, on synthetic data with classes. Rows "as
any network" simulate in deviations, where those of dense chains are simulated in voltages and rates, in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import harness
import torch
from problems import Problem, Settings, add_sizes

from dfc_lightning import LearningRule, PIController, StrongDFC, StrongSampled, TwoPhaseStrongDFC
from dfc_lightning.network.judging import judged
from dfc_lightning.settling import StrongSimulation, strong_simulation
from dfc_lightning.settling.strong_dynamics import StrongGeneral

AS_ANY = ", as any network"
PI = PIController(alpha=8.1e-3, k_p=2.0, leak="control")
CALM = StrongSimulation(dt=1e-3, tau_ratio=0.0355)
NOISY = StrongSimulation(dt=1e-3, tau_ratio=0.0093, sigma=0.0043, sigma_output=0.03, tau_noise=0.07)
PASS = StrongSampled(StrongSimulation(dt=3.2e-3, tau_ratio=0.0072, apical_tau=0.13, sigma=0.15), link="softmax")


@contextmanager
def as_any_network() -> Iterator[None]:
    """Simulate chains as other networks are."""
    held = strong_simulation.strong_dynamics
    strong_simulation.strong_dynamics = StrongGeneral
    try:
        yield
    finally:
        strong_simulation.strong_dynamics = held


def passed(problem: Problem, method: StrongSampled) -> list[torch.Tensor]:
    """The gradient of the feedback weights in a pass, with the pass and its loss."""
    forward, grad = judged(problem.network, lambda: problem.loss(problem.network(problem.x), problem.y))
    with torch.no_grad():
        return method.towards(grad).gradient(forward, lambda shape: torch.randn(shape).to(grad))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = harness.arguments(__doc__, repeats=5)
    add_sizes(parser)
    parser.add_argument("--steps", default=499, type=int, help="steps of a simulation")
    options = harness.parse(parser, argv)
    settings = Settings.load("mnist/dfc_ss", options)
    problem = settings.problem(options.batch, options.dtype, options.device, "xavier_normal")
    calm, noisy = (replace(each, steps=options.steps) for each in (CALM, NOISY))
    method = replace(PASS, settling=replace(PASS.settling, steps=options.steps))
    rules: dict[str, LearningRule | None] = {
        "backprop": None,
        "two phases, steady state": TwoPhaseStrongDFC(link="softmax"),
        f"two phases, {options.steps} steps": TwoPhaseStrongDFC(calm, PI, "softmax"),
        f"single phase, {options.steps} steps": StrongDFC(noisy, PI, "softmax"),
    }
    calls: dict[str, Callable[[], Any]] = {
        name: (lambda rule=rule: problem.update(rule)) for name, rule in rules.items()
    }
    calls[f"feedback pass, {options.steps} steps"] = lambda: passed(problem, method)

    def generally(call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> None:
            with as_any_network():
                call()

        return run

    calls |= {name + AS_ANY: generally(call) for name, call in list(calls.items()) if name.endswith("steps")}
    times = harness.interleave(calls, options.repeats, options.device)
    results = {
        name: {"ms": harness.milliseconds(times, name), "ratio": harness.ratio(times, name, "backprop")}
        for name in calls
    }
    rows = [(name, *result.values()) for name, result in results.items()]
    harness.report("strong_dfc", options, {"updates": results}, harness.table(("update", "ms", "× backprop"), rows))


if __name__ == "__main__":
    main()
