"""How well ``DFCStrategy()`` trains with no argument, beside backprop, fixed feedback and DFA: test error and seconds.

    python benchmarks/defaults.py --epochs 5

One network of the user's kind (784-256-256-10, Adam with its usual learning rate), tanh or ReLU, on MNIST and
Fashion-MNIST.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning as L
import torch

from dfc_lightning import DFA, DFCStrategy, FeedbackLearning
from dfc_lightning.data import MNIST, FashionMNIST
from dfc_lightning.models import MLP, Classifier

STRATEGIES: dict[str, Callable[[], DFCStrategy | str]] = {
    "backprop": lambda: "auto",
    "DFCStrategy()": DFCStrategy,
    "fixed feedback": lambda: DFCStrategy(feedback=FeedbackLearning(initial_passes=0, passes_per_epoch=0)),
    "DFA": lambda: DFCStrategy(DFA()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", default=5, type=int, help="epochs of each run (default: 5)")
    parser.add_argument("--seed", default=0, type=int, help="seed of each run (default: 0)")
    parser.add_argument("--threads", default=torch.get_num_threads(), type=int, help="CPU threads of torch")
    parser.add_argument("--out", default=Path("runs/benchmarks"), type=Path, help="folder for the JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    rows = []
    print("| data | nonlinearity | strategy | test error, % | s |\n|---|---|---|--:|--:|")
    for dataset in (MNIST, FashionMNIST):
        for nonlinearity in ("tanh", "relu"):
            for name, strategy in STRATEGIES.items():
                L.seed_everything(options.seed, verbose=False)
                data = dataset(batch_size=128)
                model = Classifier(MLP([784, 256, 256, 10], nonlinearity), partial(torch.optim.Adam, lr=1e-3))
                trainer = L.Trainer(
                    max_epochs=options.epochs,
                    strategy=strategy(),
                    logger=False,
                    enable_checkpointing=False,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                )
                start = time.perf_counter()
                trainer.fit(model, data)
                seconds = time.perf_counter() - start
                error = trainer.test(model, data, verbose=False)[0]["test/error"]
                print(f"| {dataset.__name__} | {nonlinearity} | {name} | {error:.2f} | {seconds:.0f} |", flush=True)
                rows.append([dataset.__name__, nonlinearity, name, error, seconds])
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "defaults.json").write_text(json.dumps({"epochs": options.epochs, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
