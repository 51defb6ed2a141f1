"""What does a whole training step of ``DFCStrategy()`` cost through the Trainer, in units of one by backprop?

    python benchmarks/training_steps.py --threads 1

Optimizer, feedback learning and logging included, on synthetic images. The strategies take turns, and the figure is the
ratio of the fastest rounds; the pass of feedback learning before the first step is left out, and told apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import lightning as L
import torch
import torch.nn.functional as F
from fits import Clock, quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dfc_lightning import DFC, DFCStrategy
from dfc_lightning.models import MLP, LeNet, ResNet

NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "784-256-256-256-10": (lambda: MLP([784, 256, 256, 256, 10], "tanh"), (784,)),
    "LeNet": (LeNet, (1, 28, 28)),
    "ResNet-8": (lambda: ResNet(blocks=1), (3, 32, 32)),
}
STRATEGIES: dict[str, Callable[[], Any]] = {
    "backprop": lambda: "auto",
    "DFCStrategy()": DFCStrategy,
    "DFCStrategy(DFC())": lambda: DFCStrategy(DFC()),
}


class Module(L.LightningModule):
    """A classifier of ten classes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The batch's loss, logged."""
        loss = F.cross_entropy(self.network(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def run(network: nn.Module, shape: tuple[int, ...], strategy: Any, steps: int, batch: int) -> list[float]:
    """Seconds of the steps of a short fit, the first left out."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(steps * batch, *shape), torch.randint(10, (steps * batch,)))
    clock = Clock()
    quiet_trainer(strategy, [clock], max_epochs=1).fit(Module(network), DataLoader(data, batch))
    return clock.steps[1:]


def main() -> None:
    parser = harness.arguments(__doc__, repeats=5)
    parser.add_argument("--batch", default=128, type=int, help="batch size")
    parser.add_argument("--steps", default=20, type=int, help="steps of each round")
    options = harness.parse(parser, None)
    print(
        f"| network | backprop, ms | {' | '.join(list(STRATEGIES)[1:])} |\n|---|--:|" + "--:|" * (len(STRATEGIES) - 1)
    )
    for name, (make, shape) in NETS.items():
        fastest = dict.fromkeys(STRATEGIES, float("inf"))
        for _ in range(options.repeats):
            for kind, strategy in STRATEGIES.items():
                steps = run(make(), shape, strategy(), options.steps, options.batch)
                fastest[kind] = min(fastest[kind], sorted(steps)[len(steps) // 4])
        base = fastest["backprop"]
        ratios = " | ".join(f"{fastest[kind] / base:.2f}" for kind in list(STRATEGIES)[1:])
        print(f"| {name} | {1000 * base:.1f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
