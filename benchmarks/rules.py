"""The field's rules on the same unmodified networks, at equal steps: what each reaches, costs, and how far it is from
backprop.

    python benchmarks/rules.py --threads 1
    python benchmarks/rules.py --tasks LeNet --rules backprop "least control" --seeds 3

A run trains one of the tasks of ``tasks.py`` through the Trainer by backprop's own optimizer and learning rate, and is
a line of the JSON: test error in percent; the angle between the update and backprop's on one batch, the median of the
epochs' ends; what an update costs on the trained network, in those of backprop, each in turn. What is there already is
not run again. The table and the figure are of all lines.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from fits import Rows, arguments, quiet_trainer
from harness import interleave
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from tasks import TASKS, Module, Task
from torch import Tensor

from dfc_lightning import (
    DFA,
    DFC,
    Backprop,
    ControlledNetwork,
    DFCStrategy,
    DifferenceTargetPropagation,
    DualPropagation,
    FeedbackAlignment,
    KolenPollack,
    LayeredDFC,
    LearningRule,
    LeastControl,
    PredictiveCoding,
    SignSymmetry,
    WeightMirror,
)
from dfc_lightning.settling import Descent

RULES: dict[str, Callable[[], LearningRule]] = {
    "backprop": Backprop,
    "DFC, layered feedback": LayeredDFC,
    "DFC, direct feedback": DFC,
    "least control": LeastControl,
    "least control, α = 1": lambda: LeastControl(alpha=1.0),
    "least control, Kolen-Pollack": lambda: LeastControl("kolen_pollack"),
    "predictive coding": PredictiveCoding,
    "predictive coding, nudge 1": lambda: PredictiveCoding(nudge=1.0),
    "predictive coding, centred": lambda: PredictiveCoding(Descent(5, 0.2), nudge=1.0, centred=True),
    "dual propagation": DualPropagation,
    "target propagation (L-DRL)": DifferenceTargetPropagation,
    "Kolen-Pollack": KolenPollack,
    "weight mirror": WeightMirror,
    "sign symmetry": SignSymmetry,
    "feedback alignment": FeedbackAlignment,
    "DFA": DFA,
}
NETS = {"LeNet, Fashion, Adam 1e-3": "LeNet-5", "Residual, Fashion, Adam 3e-3": "residual net"}
ROUNDS = 5
"""Of timing an update and backprop's in turn."""


class Compass(L.Callback):
    """The angle between the rule's update and backprop's, in degrees, on the first training samples, every epoch."""

    def __init__(self, strategy: DFCStrategy) -> None:
        self.strategy, self.angles = strategy, []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the angle."""
        assert isinstance(pl_module, Module)
        mine, theirs = (taught(self.strategy.network, rule, pl_module) for rule in (self.strategy.rule, Backprop()))
        self.angles.append(float(torch.rad2deg(torch.acos(F.cosine_similarity(mine, theirs, dim=0).clamp(-1, 1)))))


def taught(network: ControlledNetwork | None, rule: LearningRule, module: Module) -> Tensor:
    """What the rule makes of a batch, all gradients in one vector."""
    assert network is not None
    task = module.task
    pairs = task.data()[0]
    x, y = pairs.inputs[: task.batch_size], pairs.targets[: task.batch_size]
    module.zero_grad()
    with torch.enable_grad(), network.taught_by(rule):
        task.loss(module(x), y).backward()
    found = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    module.zero_grad()
    return found


def train(task: Task, rule: str, seed: int) -> dict[str, Any]:
    """One run's figures."""
    L.seed_everything(seed, verbose=False)
    module, strategy = Module(task), DFCStrategy(RULES[rule](), watch="off")
    compass = Compass(strategy)
    trainer = quiet_trainer(strategy, [compass], max_epochs=task.epochs)
    start = time.perf_counter()
    trainer.fit(module)
    seconds, figure = time.perf_counter() - start, module.judged()
    module.train()
    ways = {name: lambda rule=rule: taught(strategy.network, rule, module) for name, rule in (
        ("rule", strategy.rule), ("backprop", Backprop()))}  # fmt: skip
    times = interleave(ways, ROUNDS, "cpu")
    price = min(times["rule"]) / min(times["backprop"])
    return {"figure": figure, "angle": statistics.median(compass.angles), "price": price, "seconds": seconds}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Means over seeds, one line a rule."""
    lines = ["| | " + " | ".join(f"{net}: error, % | angle | price" for net in NETS.values()) + " |"]
    lines.append("|---" + "|--:|--:|--:" * len(NETS) + "|")
    for rule in RULES:
        cells = []
        for name in NETS:
            mine = [row for row in rows if (row["task"], row["rule"]) == (name, rule)]
            if not mine:
                cells.append("– | – | –")
                continue
            error, angle, price = (statistics.mean(row[key] for row in mine) for key in ("figure", "angle", "price"))
            cells.append(f"{error:.2f} | {angle:.0f}° | {price:.1f}")
        lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """Error by price, a panel a network; the angle to backprop beside each rule's name."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, (name, net) in zip(figure.subplots(1, len(NETS)), NETS.items()):
        for k, rule in enumerate(RULES):
            mine = [row for row in rows if (row["task"], row["rule"]) == (name, rule)]
            if not mine:
                continue
            error, angle, price = (statistics.mean(row[key] for row in mine) for key in ("figure", "angle", "price"))
            axes.plot(price, error, "os^D"[k // 4 % 4], color=f"C{k % 10}", label=f"{rule}, {angle:.0f}°")
        axes.set(xscale="log", xlabel="an update, in those of backprop", ylabel="test error, %", title=net)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), title="rule, angle to backprop")
    return figure


def main() -> None:
    """Run what is missing; print the table, write the figure."""
    parser = arguments(__doc__, "runs/benchmarks/rules.jsonl")
    parser.add_argument("--tasks", nargs="+", default=[""], help="parts of the names of tasks (default: both)")
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES), help="default: all")
    parser.add_argument("--seeds", default=1, type=int, help="seeds of each run, from 1 on (default: 1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = Rows(options.out, ["task", "rule", "seed"])
    for seed in range(1, options.seeds + 1):
        for name in NETS:
            if not any(part.lower() in name.lower() for part in options.tasks):
                continue
            for rule in options.rules:
                if rows.holds(task=name, rule=rule, seed=seed):
                    continue
                rows.add({"task": name, "rule": rule, "seed": seed, **train(TASKS[name], rule, seed)})
    print(table(rows.all))
    draw(rows.all).savefig(options.out.with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
