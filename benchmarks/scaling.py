"""How do the costs grow with batch size, width, depth and the number of outputs?

From the paper's MNIST network, 784-256-256-256-10 at batch 128, one size at a time is varied. DFC-SSA and DFC-SS are
whole updates, Expected a whole feedback update. The full range takes two to three minutes on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import harness
from feedback import feedback_update
from problems import Settings, add_sizes

from dfc_lightning.settling import Linearized, SteadyState

SIZES = {
    "batch": (32, 128, 512, 2048, 8192),
    "width": (64, 128, 256, 512, 1024, 2048, 4096),
    "depth": (2, 4, 8, 16, 32),
    "outputs": (2, 10, 32, 64, 128, 500, 1000, 2000),
}
LABELS = {"batch": "batch size", "width": "hidden width", "depth": "layers", "outputs": "outputs n_L"}


def resized(settings: Settings, axis: str, size: int) -> Settings:
    """The recipe with one size of its network changed."""
    first, *hidden, last = settings.sizes
    if axis == "width":
        hidden = [size] * len(hidden)
    elif axis == "depth":
        hidden = [hidden[0]] * (size - 1)
    elif axis == "outputs":
        last = size
    return replace(settings, sizes=[first, *hidden, last])


def calls_at(settings: Settings, batch: int, options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """The methods on one network, each with feedback weights of its own."""

    def fresh() -> Any:
        return settings.problem(batch, options.dtype, options.device)

    plain, first_order, steady, learning = fresh(), fresh(), fresh(), fresh()
    ssa, ss = settings.dfc(Linearized()), settings.dfc(SteadyState(rtol=1e-5))
    return {
        "backprop": lambda: plain.update(None),
        "DFC-SSA": lambda: first_order.update(ssa),
        "DFC-SS": lambda: steady.update(ss),
        "feedback, Expected": feedback_update(learning, settings, settings.expected),
    }


def measurements(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One entry a network and method."""
    settings = Settings.load("mnist/dfc_ss", options)
    for axis, sizes in SIZES.items():
        for size in (s for s in sizes if s <= getattr(options, f"max_{axis}")):
            batch = size if axis == "batch" else options.batch
            calls = calls_at(resized(settings, axis, size), batch, options)
            times = harness.interleave(calls, options.repeats, options.device)
            for name in calls:
                ms, ratio = harness.milliseconds(times, name), harness.ratio(times, name, "backprop")
                yield {"axis": axis, "size": size, "method": name, "ms": ms, "ratio": ratio, "seconds": times[name]}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = harness.arguments(__doc__, repeats=5)
    add_sizes(parser)
    for axis, label in LABELS.items():
        parser.add_argument(f"--max-{axis}", default=SIZES[axis][-1], type=int, help=f"largest {label} to go to")
    options = harness.parse(parser, argv)
    found = list(measurements(options))
    names = list(dict.fromkeys(entry["method"] for entry in found))

    def of(axis: str, name: str) -> list[dict[str, Any]]:
        return [entry for entry in found if (entry["axis"], entry["method"]) == (axis, name)]

    tables = []
    for axis, label in LABELS.items():
        columns = [of(axis, name) for name in names]
        rows = [(at[0]["size"], at[0]["ms"], *(entry["ratio"] for entry in at[1:])) for at in zip(*columns)]
        tables.append(harness.table((label, "backprop, ms", *(f"{name}, ×" for name in names[1:])), rows))
    harness.report("scaling", options, {"measurements": found}, "\n\n".join(tables))

    def draw(grid: Any) -> None:
        for axes, (axis, label) in zip(grid.flat, LABELS.items()):
            for name in names:
                entries = of(axis, name)
                style = "k--" if name == "backprop" else "o-"
                axes.plot([e["size"] for e in entries], [e["ms"] for e in entries], style, markersize=4, label=name)
            axes.set(xscale="log", yscale="log", xlabel=label, ylabel="ms an update")
            sizes = [entry["size"] for entry in of(axis, names[0])]
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.set_xticks([], minor=True)
        grid.flat[0].legend(frameon=False)

    harness.figure("scaling", options, 2, 2, draw)


if __name__ == "__main__":
    main()
