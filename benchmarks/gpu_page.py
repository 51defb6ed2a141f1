"""Make docs/gpu.md of what gpu.py has measured: ``python benchmarks/gpu_page.py runs/benchmarks/gpu.json``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness

BACKPROP = "backprop"
NOTHING = "Nothing of this was measured on a GPU: `python benchmarks/gpu.py` does so where there is one."
TEXT = """
# On a GPU

`Trainer(accelerator="gpu", strategy=DFCStrategy())`, with any `precision`. The tests of what may differ there are one
set, `pytest -m cuda`; they skip where there is no GPU. `DFC_TEST_DEVICE=cpu` rehearses them on the CPU.

- **Precision.** Whatever forward passes are rounded to, by autocast or by TF32, torch's default in convolutions,
  control is computed in float32 or better: a steady state to 1e-3 is out of reach of TF32's three digits.
- **Noise** is drawn on the device. Equal seeds give equal runs on equal devices, resumed ones too, but other numbers
  than on a CPU.
- **The host** looks at data as seldom as the methods' pages say; a rule without dynamics never does.
- **Memory** beside backprop's is the record of the pass and the feedback weights; it is given back after the fit.

## What a step costs

From the input to `.grad`, or to the feedback weights; times are medians, launches are kernels and copies of one step.
DFC-SS is solved to 1e-3, the default as the package has it, feedback steps are on an eighth of the samples.
"""


def page(found: dict[str, Any]) -> str:
    """The tables, after a line that says what was measured."""
    on = found["machine"]
    lines = [NOTHING]
    if on["gpu"]:
        lines = [f"Measured on one {on['gpu']}, torch {on['torch']}, {on['date']}, by `python benchmarks/gpu.py`."]
    for key in dict.fromkeys((e["net"], e["batch"], e["precision"]) for e in found["entries"]):
        entries = [e for e in found["entries"] if (e["net"], e["batch"], e["precision"]) == key]
        base = next((e["ms"] for e in entries if e["method"] == BACKPROP and "ms" in e), None)
        rows = [
            [e["method"], e.get("error", "")[:60], None, None, None, None]
            if "error" in e
            else [
                e["method"],
                e["ms"],
                e["ms"] / base if base else None,
                e.get("launches") if on["gpu"] else e["operations"],
                e["looks"],
                e["peak_bytes"] / 2**20 if e["peak_bytes"] else None,
            ]
            for e in entries
        ]
        header = ["a step", "ms", "× backprop", "launches" if on["gpu"] else "operations", "host looks", "peak MiB"]
        lines += ["", f"### {key[0]}, batch {key[1]}, {key[2]}", "", harness.table(header, rows)]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figures", type=Path, nargs="?", help="gpu.json; without it the page says that there are none")
    parser.add_argument("--out", type=Path, default=Path("docs/gpu.md"), help="the page (default: docs/gpu.md)")
    options = parser.parse_args(argv)
    first, tables = NOTHING, ""
    if options.figures is not None:
        first, _, tables = page(json.loads(options.figures.read_text())).partition("\n")
    options.out.write_text(f"{first}\n{TEXT}{tables}")


if __name__ == "__main__":
    main()
