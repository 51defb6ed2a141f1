"""How well ``DFCStrategy()`` trains with no argument, beside backprop and other rules, on the nets people have.

    python benchmarks/defaults.py --seeds 3
    python benchmarks/defaults.py --tasks friedman1 moons --rules backprop default direct

Every run trains one of the tasks of ``tasks.py`` through the Trainer by backprop's own optimizer and learning rate, and
is a line of the JSON: test error in percent or test loss, seconds, and how large the update was by backprop's on one
batch (smallest and largest of the epochs' ends). What is there already is not run again.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from fits import Rows, arguments, quiet_trainer
from tasks import TASKS, Module, Task
from torch import Tensor

from dfc_lightning import DFA, DFC, Backprop, DFCStrategy, LearningRule, MinimumNorm
from dfc_lightning.rules import FeedbackAlignment, KolenPollack, SignSymmetry

RULES: dict[str, Callable[[], LearningRule | None]] = {
    "default": lambda: None,
    "direct": DFC,
    "minimum norm": MinimumNorm,
    "Kolen-Pollack": KolenPollack,
    "sign symmetry": SignSymmetry,
    "FA": FeedbackAlignment,
    "DFA": DFA,
}


class Sizes(L.Callback):
    """Measures ‖update‖ / ‖backprop‖ on one batch after every epoch."""

    def __init__(self, strategy: DFCStrategy) -> None:
        self.strategy, self.ratios = strategy, []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Both gradients on the first samples of the training data."""
        assert isinstance(pl_module, Module) and self.strategy.network is not None
        task = pl_module.task
        pairs = task.data()[0]
        x, y = pairs.inputs[: task.batch_size], pairs.targets[: task.batch_size]
        norms = [self._norm(rule, task, x, y) for rule in (self.strategy.rule, Backprop())]
        self.ratios.append(norms[0] / max(norms[1], 1e-30))

    def _norm(self, rule: LearningRule, task: Task, x: Tensor, y: Tensor) -> float:
        network = self.strategy.network
        assert network is not None
        forward = network.observe(x)
        with torch.enable_grad():
            output = forward.output.detach().requires_grad_()
            (loss_grad,) = torch.autograd.grad(task.loss(output, y), output)
        with torch.no_grad():
            update = rule.teach(forward, loss_grad * len(x))
        return float(torch.stack([t.square().sum() for each in update.gradients for t in each]).sum().sqrt())


def train(task: Task, rule: str, seed: int) -> dict[str, Any]:
    """One run's figures."""
    L.seed_everything(seed, verbose=False)
    module = Module(task)
    strategy = "auto" if rule == "backprop" else DFCStrategy(RULES[rule](), watch="off")
    sizes = [Sizes(strategy)] if isinstance(strategy, DFCStrategy) else []
    trainer = quiet_trainer(strategy, sizes, max_epochs=task.epochs)
    start = time.perf_counter()
    trainer.fit(module)
    seconds = time.perf_counter() - start
    ratios = sizes[0].ratios if sizes else [1.0]
    return {"figure": module.judged(), "seconds": seconds, "smallest": min(ratios), "largest": max(ratios)}


def table(rows: Sequence[dict[str, Any]], rules: Sequence[str]) -> str:
    """Means over seeds, one line a task; with the ratio of updates where a rule is not backprop."""
    lines = ["| task | " + " | ".join(rules) + " |", "|---" + "|--:" * len(rules) + "|"]
    for name, task in TASKS.items():
        cells = []
        for rule in rules:
            mine = [row for row in rows if row["task"] == name and row["rule"] == rule]
            if not mine:
                cells.append("–")
                continue
            figure = statistics.mean(row["figure"] for row in mine)
            text = f"{figure:.2f} %" if task.error else f"{figure:.4f}"
            if rule != "backprop":
                low, high = min(row["smallest"] for row in mine), max(row["largest"] for row in mine)
                text += f" ({low:.2g} to {high:.2g})"
            cells.append(text)
        if any(cell != "–" for cell in cells):
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__, "runs/benchmarks/defaults.jsonl")
    parser.add_argument("--tasks", nargs="+", default=[""], help="parts of the names of tasks (default: all)")
    parser.add_argument("--rules", nargs="+", default=["backprop", "default"], choices=["backprop", *RULES])
    parser.add_argument("--seeds", default=3, type=int, help="seeds of each run, from 1 on (default: 3)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = Rows(options.out, ["task", "rule", "seed"])
    for seed in range(1, options.seeds + 1):
        for name, task in TASKS.items():
            if not any(part.lower() in name.lower() for part in options.tasks):
                continue
            for rule in options.rules:
                if rows.holds(task=name, rule=rule, seed=seed):
                    continue
                rows.add({"task": name, "rule": rule, "seed": seed, **train(task, rule, seed)})
    print(table(rows.all, options.rules))


if __name__ == "__main__":
    main()
