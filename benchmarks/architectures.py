"""Models as people have them, untouched: taken or refused, and what they learn by the default rule beside backprop.

    python benchmarks/architectures.py --threads 1
    python benchmarks/architectures.py --models LSTM GPT --steps 200

Each model of ``zoo.py`` is trained from the same start on the same batches by backprop and by ``LayeredDFC()`` with the
feedback learning that ``DFCStrategy()`` has, both with Adam. A line of the JSON: the points, feedback weights, the mean
loss of the last quarter of the steps under each, and what a step costs in those of backprop. What is there already is
not run again. The table is of all lines, and goes into docs/architectures.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
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


class Clock(L.Callback):
    """The time of each step, in seconds."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Note it."""
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Note it."""
        self.times.append(time.perf_counter() - self.start)


def trained(model: Model, steps: int, lr: float, strategy: DFCStrategy | str) -> tuple[float, float]:
    """The mean loss of the last quarter of the steps, and the median time of a step."""
    L.seed_everything(0, verbose=False)
    module, clock = Module(model, lr), Clock()
    data = TensorDataset(*model.data())
    loader = DataLoader(data, model.batch_size, shuffle=True, drop_last=True)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        strategy=strategy,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    last = module.losses[-max(steps // 4, 1) :]
    return float(torch.stack(last).mean()), sorted(clock.times)[len(clock.times) // 2]


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[""], help="parts of the names of models (default: all)")
    parser.add_argument("--steps", default=60, type=int, help="training steps (default: 60)")
    parser.add_argument("--lr", default=1e-3, type=float, help="Adam's learning rate (default: 1e-3)")
    parser.add_argument("--threads", default=torch.get_num_threads(), type=int, help="CPU threads of torch")
    parser.add_argument("--out", default=Path("results/architectures.jsonl"), type=Path, help="where the lines are")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    done = {row["model"] for row in rows}
    for name in MODELS:
        if name in done or not any(part.lower() in name.lower() for part in options.models):
            continue
        row = run(name, options.steps, options.lr)
        rows.append(row)
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    rows.sort(key=lambda row: list(MODELS).index(row["model"]))
    text = PAGE.read_text()
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    PAGE.write_text(f"{before}{MARKS[0]}\n{table(rows)}\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
