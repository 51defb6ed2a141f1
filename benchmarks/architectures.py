"""Models as people have them, untouched: taken or refused, and what they learn by the default rule beside backprop.

    python benchmarks/architectures.py --threads 1
    python benchmarks/architectures.py --models LSTM GPT --steps 200

Each model of ``zoo.py`` is trained from the same start on the same batches by backprop and by ``LayeredDFC()`` with the
feedback learning that ``DFCStrategy()`` has, both with Adam. A line of the JSON: the points, feedback weights, the mean
loss of the last quarter of the steps under each, and what a step costs in those of backprop. What is there already is
not run again. The table is of all lines, and goes into docs/architectures.md.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from fits import Clock, Rows, arguments, quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from zoo import MODELS, Batch, Model

from dfc_lightning import ControlError, DFCStrategy

MARKS = "<!-- models -->", "<!-- end of models -->"
PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"


class Module(L.LightningModule):
    """A user's module around a model of the zoo."""

    def __init__(self, model: Model, lr: float) -> None:
        super().__init__()
        self.model, self.net, self.lr, self.losses = model, model.make(), lr, list[Tensor]()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The model's loss, noted."""
        loss = self.model.loss(self.net, batch)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over all parameters."""
        return torch.optim.Adam(self.parameters(), self.lr)


def trained(model: Model, steps: int, lr: float, strategy: DFCStrategy | str) -> tuple[float, float]:
    """The mean loss of the last quarter of the steps, and the median time of a step."""
    L.seed_everything(0, verbose=False)
    module, clock = Module(model, lr), Clock()
    data = TensorDataset(*model.data())
    loader = DataLoader(data, model.batch_size, shuffle=True, drop_last=True)
    quiet_trainer(strategy, [clock], max_steps=steps).fit(module, loader)
    last = module.losses[-max(steps // 4, 1) :]
    return float(torch.stack(last).mean()), statistics.median(clock.steps)


def run(name: str, steps: int, lr: float) -> dict[str, Any]:
    """A model's line."""
    model = MODELS[name]
    row: dict[str, Any] = {"model": name, "steps": steps, "lr": lr}
    strategy = DFCStrategy(output=model.output)
    try:
        loss, seconds = trained(model, steps, lr, strategy)
    except ControlError as refusal:
        return row | {"refused": str(refusal)}
    assert strategy.network is not None
    plain, plain_seconds = trained(model, steps, lr, "auto")
    return row | {
        "points": len(strategy.network.points),
        "parameters": sum(p.numel() for p in strategy.network.module.parameters()),
        "feedback": sum(q.numel() for q in strategy.network.feedback),
        "loss": loss,
        "backprop": plain,
        "price": seconds / plain_seconds,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line a model."""
    lines = [
        "| model | points | parameters | feedback weights | a step, in backprop's | loss | backprop's | ratio |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if "refused" in row:
            lines.append(f"| {row['model']} | refused: {row['refused'].split('. ')[0]} | | | | | | |")
            continue
        lines.append(
            f"| {row['model']} | {row['points']} | {row['parameters']:,} | {row['feedback']:,} | {row['price']:.1f} "
            f"| {row['loss']:.3f} | {row['backprop']:.3f} | {row['loss'] / row['backprop']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, and write the table into the page."""
    parser = arguments(__doc__, "results/architectures.jsonl")
    parser.add_argument("--models", nargs="+", default=[""], help="parts of the names of models (default: all)")
    parser.add_argument("--steps", default=60, type=int, help="training steps (default: 60)")
    parser.add_argument("--lr", default=1e-3, type=float, help="Adam's learning rate (default: 1e-3)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = Rows(options.out, ["model"])
    for name in MODELS:
        if any(part.lower() in name.lower() for part in options.models) and not rows.holds(model=name):
            rows.add(run(name, options.steps, options.lr))
    ordered = sorted(rows.all, key=lambda row: list(MODELS).index(row["model"]))
    text = PAGE.read_text()
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    PAGE.write_text(f"{before}{MARKS[0]}\n{table(ordered)}\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
