"""How much memory does one update need at its peak, in units of a backprop step's?

Working memory is what an update allocates beyond what is there before it: weights, feedback weights and the batch.
``.grad`` is part of it. On a GPU it is the caching allocator's peak. On a CPU it is the peak of the running sum of
torch's allocations, as its profiler records them; scratch space that a BLAS keeps to itself is not seen. The rows are
those of ``settling.py``, and the two feedback updates; a simulated update is cut to 20 steps, for it stores no
trajectory.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import harness
import torch
from feedback import feedback_update, methods
from problems import Problem, Settings
from settling import Row, add_options, rows
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """The most memory that ``call`` holds at a time beyond what is held before it, once warm."""
    call()
    gc.disable()  # else cycles left behind earlier could be released during the call and count as its own
    try:
        if device.startswith("cuda"):
            return _cuda_peak(call, device)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            call()
    finally:
        gc.enable()
    return peak_of([(e.start_ns(), e.nbytes()) for e in memory_events(recorded)])


def _cuda_peak(call: Callable[[], Any], device: str) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def memory_events(recorded: profile) -> list[Any]:
    """The profiler's record of every allocation (positive bytes) and release (negative)."""
    profiler = recorded.profiler
    assert profiler is not None and profiler.kineto_results is not None
    return [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]


def peak_of(events: Sequence[tuple[int, int]]) -> int:
    """The largest running sum of bytes, events taken in the order of their times."""
    held = most = 0
    for _, nbytes in sorted(events, key=lambda event: event[0]):
        held += nbytes
        most = max(most, held)
    return most


def resident_bytes(problem: Problem) -> int:
    """Bytes of weights, feedback weights and batch."""
    held = [*problem.network.module.parameters(), *problem.network.feedback, problem.x, problem.y]
    return sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in held}.values())


def update_of(row: Row) -> Callable[[], Any]:
    """A call that makes the row's update from no gradients to gradients, and lets go of them."""

    def call() -> None:
        row.problem.update(row.rule)
        row.problem.network.module.zero_grad()

    return call


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = harness.arguments(__doc__, repeats=1)
    add_options(parser)
    parser.set_defaults(euler_steps=20, train_steps=30)
    options = harness.parse(parser, argv)
    jobs = [(row.name, update_of(row), row.problem, row.baseline) for row in rows(options)]
    settings = Settings.load("mnist/dfc_ss", options)
    for name, method in methods(settings).items():
        problem = settings.problem(options.batch, options.dtype, options.device)
        jobs.append((f"feedback, {name}", feedback_update(problem, settings, method), problem, "backprop"))

    found: dict[str, dict[str, float]] = {}
    for name, call, problem, baseline in jobs:
        working = max(peak_bytes(call, options.device) for _ in range(options.repeats))
        total = working + resident_bytes(problem)
        found[name] = {"working_bytes": working, "total_bytes": total}
        found[name]["working_ratio"] = working / found[baseline]["working_bytes"]
        found[name]["total_ratio"] = total / found[baseline]["total_bytes"]
    text = harness.table(
        ("update", "working, MB", "× backprop", "with weights and batch, MB", "× backprop"),
        [
            (name, f["working_bytes"] / 1e6, f["working_ratio"], f["total_bytes"] / 1e6, f["total_ratio"])
            for name, f in found.items()
        ],
    )
    harness.report("memory", options, {"updates": found}, text)
    ratios = {name: f["working_ratio"] for name, f in found.items()}
    label = "peak working memory, in backprop steps"
    harness.figure("memory", options, 1, 1, lambda axes: harness.bars(axes, ratios, label))


if __name__ == "__main__":
    main()
