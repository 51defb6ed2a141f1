"""What a step costs on a GPU: rules and feedback learning beside backprop, by network, batch size and precision.

Times are medians between device events; launches, operations and looks of the host are of one step. Figures go to
``<out>/gpu.json`` after every entry, and as tables to ``<out>/gpu.md``; ``gpu_page.py`` makes docs/gpu.md of them.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import captured
import harness
import torch
import torch.nn.functional as F
from gpu_page import BACKPROP, page
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dfc_lightning import (
    DFC,
    Backprop,
    ControlledNetwork,
    Expected,
    FeedbackLearner,
    FeedbackLearning,
    KolenPollack,
    LayeredDFC,
    PIController,
)
from dfc_lightning.models import MLP, LeNet
from dfc_lightning.settling import Euler, Linearized, SteadyState

EULER_STEPS, BLOCK = 999, 27
aten = torch.ops.aten


def resnet18() -> nn.Module:
    """Torchvision's, for ten classes."""
    from torchvision.models import resnet18 as make

    return make(num_classes=10)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 784-256³-10": (lambda: MLP([784, 256, 256, 256, 10], "tanh"), (784,)),
    "LeNet": (LeNet, (1, 28, 28)),
    "ResNet-18, 32×32": (resnet18, (3, 32, 32)),
}
TINY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 12-8-4": (lambda: MLP([12, 8, 4], "tanh"), (12,)),
    "LeNet": (LeNet, (1, 28, 28)),
}
CONTROLLER = PIController(0.1, 1.0)
FEEDBACK, EULER = "feedback step", f"DFC-SS, {EULER_STEPS} Euler steps"
RULES = {
    BACKPROP: None,
    "gate alone": Backprop(),
    "DFC-SS": DFC(SteadyState(rtol=1e-3), CONTROLLER),
    "DFC-SSA": DFC(Linearized(), CONTROLLER),
    "default (LayeredDFC)": LayeredDFC(),
    "Kolen-Pollack": KolenPollack(),
    EULER: DFC(Euler(steps=EULER_STEPS), CONTROLLER),
}


class Counts(TorchDispatchMode):
    """Counts operations, and those by which the host waits for data."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.looks = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        if func in (aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default):
            self.looks += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def precision(name: str, device: str) -> Iterator[None]:
    """float32, TF32 in matrix products and convolutions, or bfloat16 by autocast."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = name == "TF32"
    try:
        with torch.autocast(device, torch.bfloat16, enabled=name == "bf16"):
            yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def steps(net: str, nets: dict[str, Any], batch: int, device: str) -> dict[str, Callable[[], Any]]:
    """A step of each method, from the input to ``.grad``, or to the feedback weights."""
    make, shape = nets[net]
    torch.manual_seed(0)
    module = make().to(device)
    x = torch.randn(batch, *shape, device=device)
    y = torch.arange(batch, device=device) % 4
    found: dict[str, Callable[[], Any]] = {}

    def update(controlled: ControlledNetwork, rule: Any) -> None:
        module.zero_grad(set_to_none=True)
        if rule is None:
            F.cross_entropy(module(x), y).backward()
            return
        with controlled.taught_by(rule):
            loss = F.cross_entropy(controlled(x), y)
        loss.backward()

    for name, rule in RULES.items():
        if name != EULER or net.startswith("MLP"):
            found[name] = partial(update, ControlledNetwork(module, seed=0), rule)
    direct = ControlledNetwork(module, seed=0)
    learner = FeedbackLearner(direct, FeedbackLearning(method=Expected(gated=True), every_nth_sample=8), seed=0)
    found[FEEDBACK] = lambda: learner.step(direct.observe(x))
    return found


def timed(call: Callable[[], Any], device: str, seconds: float) -> tuple[float, float, int]:
    """Median and fastest milliseconds of a step, and of how many."""
    took: list[float] = []
    until = time.perf_counter() + seconds
    while len(took) < 3 or (time.perf_counter() < until and len(took) < 200):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            took.append(start.elapsed_time(end))
        else:
            begun = time.perf_counter()
            call()
            took.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(took), min(took), len(took)


def launches(call: Callable[[], Any]) -> int | None:
    """Kernels and copies of a step; None where they cannot be counted."""
    from torch.profiler import ProfilerActivity, profile

    try:
        call()
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
            call()
            torch.cuda.synchronize()
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in seen.events()) or None
    except Exception as error:
        print(f"launches not counted: {error}", file=sys.stderr)
        return None


def measured(call: Callable[[], Any], device: str, seconds: float) -> dict[str, Any]:
    """Everything of a step."""
    try:
        for _ in range(3):  # networks are looked at, feedback weights are made, libraries choose their kernels
            call()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        call()
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
        median, fastest, repeats = timed(call, device, seconds)
        with Counts() as counts:
            call()
        return {
            "ms": median,
            "fastest_ms": fastest,
            "repeats": repeats,
            "operations": counts.operations,
            "looks": counts.looks,
            "peak_bytes": peak,
        }
    except Exception as error:  # an entry that fails is a finding, and leaves the others
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def graphs(nets: dict[str, Any], batch: int, seconds: float) -> list[dict[str, Any]]:
    """Simulations of the chain by itself, with and without a CUDA graph."""
    net = next(iter(nets))
    make, shape = nets[net]
    case = {"net": net, "batch": batch, "precision": "float32"}
    try:
        calls, apart = captured.ways(make().to("cuda"), torch.randn(batch, *shape, device="cuda"), EULER_STEPS, BLOCK)
    except Exception as error:
        return [{**case, "method": "graph", "error": f"{type(error).__name__}: {str(error)[:300]}"}]
    found = [
        {**case, "method": name, "apart": apart, **measured(call, "cuda", seconds)} for name, call in calls.items()
    ]
    return found


def plan(nets: Sequence[str], batches: Sequence[int], device: str) -> list[tuple[str, int, str]]:
    """What is measured, the most wanted first: every batch in float32, and the middle one in other precisions."""
    middle = batches[len(batches) // 2]
    plain = [(net, batch, "float32") for batch in sorted(batches, key=lambda b: b != middle) for net in nets]
    others = ["TF32", "bf16"] if device == "cuda" else []
    return plain[: len(nets)] + [(net, middle, name) for name in others for net in nets] + plain[len(nets) :]


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.arguments(__doc__, repeats=1)
    parser.set_defaults(device="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", default=[128, 512, 2048], type=int, nargs="+", help="batch sizes")
    parser.add_argument("--seconds", default=0.25, type=float, help="to spend on an entry's repetitions")
    parser.add_argument("--limit", default=115.0, type=float, help="seconds after which no entry is begun")
    parser.add_argument("--quick", action="store_true", help="tiny networks and few repetitions, to try the script")
    options = harness.parse(parser, argv)
    if options.quick:
        options.batches, options.seconds = [8], 0.0
    nets = TINY if options.quick else NETS
    found: dict[str, Any] = {"machine": harness.machine(options), "entries": []}
    options.out.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()

    def write(found: dict[str, Any]) -> None:
        (options.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")

    for net, batch, name in plan(list(nets), options.batches, options.device):
        for method, call in steps(net, nets, batch, options.device).items():
            if time.perf_counter() - begun > options.limit:
                print("No time left for more.", file=sys.stderr)
                break
            with precision(name, options.device):
                entry = measured(call, options.device, options.seconds)
            found["entries"].append({"net": net, "batch": batch, "precision": name, "method": method, **entry})
            write(found)
        if options.device == "cuda":
            torch.cuda.empty_cache()
    if options.device == "cuda":
        for batch in options.batches:
            found["entries"] += graphs(nets, batch, options.seconds)
            write(found)
    if options.device == "cuda":  # last, since a profiler that has run slows what follows
        for entry in found["entries"]:
            if time.perf_counter() - begun > 1.15 * options.limit or "error" in entry:
                continue
            if entry["precision"] == "float32" and "apart" not in entry:
                step = steps(entry["net"], nets, entry["batch"], "cuda")[entry["method"]]
                with precision("float32", "cuda"):
                    entry["launches"] = launches(step)
                write(found)
    text = page(found)
    (options.out / "gpu.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
