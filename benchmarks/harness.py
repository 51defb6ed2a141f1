"""What the benchmarks share: an interleaved timer, and reports that name the class of machine they ran on."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

SHORTEST = 0.01
"""Seconds that one timed burst of calls lasts at least."""

Times = dict[str, list[float]]
"""Seconds a call, one figure a round, by method."""


def arguments(description: str | None, repeats: int) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", default="cpu", help="where to run, e.g. cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"], help="of weights and data")
    parser.add_argument("--repeats", default=repeats, type=int, help="rounds over all methods")
    parser.add_argument("--threads", default=torch.get_num_threads(), type=int, help="CPU threads of torch")
    parser.add_argument("--out", default=Path("runs/benchmarks"), type=Path, help="folder for JSON and figure")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parsed options, the dtype as torch's; threads are set and the random state is seeded."""
    options = parser.parse_args(argv)
    options.dtype = getattr(torch, options.dtype)
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: run at least one round")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch sees no GPU here; use --device cpu")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    return options


# Timing


def seconds(call: Callable[[], Any], device: str, calls: int = 1) -> float:
    """Seconds a call over a burst of calls; on a GPU, from an idle device to an idle device."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    _synchronize(device)
    return (time.perf_counter() - start) / calls


def interleave(
    calls: Mapping[str, Callable[[], Any]], repeats: int, device: str, rounds: Mapping[str, int] | None = None
) -> Times:
    """Time all methods in turn, round after round, in a new order each round: a busy machine slows them alike.

    Args:
        calls: the methods by name.
        repeats: number of rounds.
        device: where they run.
        rounds: methods that take part in the first so many rounds only.
    """
    bursts = {}
    for name, call in calls.items():
        call()  # warm up
        bursts[name] = max(1, min(1000, round(SHORTEST / seconds(call, device))))
    times: Times = {name: [] for name in calls}
    order, shuffled = list(calls), random.Random(0)
    for k in range(repeats):
        shuffled.shuffle(order)
        for name in order:
            if k < (rounds or {}).get(name, repeats):
                times[name].append(seconds(calls[name], device, bursts[name]))
    return times


def ratio(times: Times, name: str, baseline: str) -> float:
    """The median over the rounds of one method's time in units of another's in the same round."""
    return statistics.median(mine / base for mine, base in zip(times[name], times[baseline]))


def milliseconds(times: Times, name: str) -> float:
    """The median time of a method."""
    return 1e3 * statistics.median(times[name])


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


# Reports


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """The class of machine, and what ran on it."""
    cuda = options.device.startswith("cuda")
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(options.device) if cuda else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "dtype": str(options.dtype).removeprefix("torch."),
    }


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table with aligned columns; floats to three digits, None as a dash."""
    cells = [list(header)] + [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[k]) for row in cells) for k in range(len(header))]
    lines = [
        "| " + " | ".join(c.ljust(w) if k == 0 else c.rjust(w) for k, (c, w) in enumerate(zip(row, widths))) + " |"
        for row in cells
    ]
    rule = "|" + "|".join("-" * (w + 2) if k == 0 else "-" * (w + 1) + ":" for k, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def report(name: str, options: argparse.Namespace, results: dict[str, Any], text: str) -> None:
    """Print the machine and the text, and write the results to ``<out>/<name>.json``."""
    on = machine(options)
    where = f"{on['gpu']}, " if on["gpu"] else ""
    print(f"{where}{on['cpu']}, {on['threads']} thread(s), torch {on['torch']}, {on['dtype']}, {on['date']}\n\n{text}")
    asked = {k: v if isinstance(v, (int, float, str, type(None))) else str(v) for k, v in vars(options).items()}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{name}.json"
    path.write_text(json.dumps({"machine": on, "options": asked, **results}, indent=1) + "\n")
    print(f"\nWritten to {path}")


def figure(name: str, options: argparse.Namespace, rows: int, columns: int, draw: Callable[[Any], None]) -> None:
    """Have ``draw`` fill a grid of axes and save it as ``<out>/<name>.png``; skipped without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("No figure: it needs matplotlib.", file=sys.stderr)
        return
    canvas = FigureCanvasAgg(Figure(figsize=(5.5 * columns, 3.8 * rows), layout="constrained"))
    draw(canvas.figure.subplots(rows, columns))
    canvas.figure.savefig(options.out / f"{name}.png", dpi=100)


def bars(axes: Any, values: Mapping[str, float], label: str) -> None:
    """Horizontal bars on a logarithmic axis, each with its value, the first on top."""
    names = list(values)[::-1]
    drawn = axes.barh(names, [values[name] for name in names])
    axes.bar_label(drawn, fmt="%.3g", padding=3)
    axes.set(xscale="log", xlabel=label)
    axes.margins(x=0.15)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-2 else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
