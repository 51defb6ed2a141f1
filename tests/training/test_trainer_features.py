"""Whatever a Trainer is told to do, ``Backprop()`` under DFCStrategy ends in the weights of plain Lightning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from cases.fits import clusters, differing, loader, quiet, weights
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint

from dfc_lightning import Backprop, DFCStrategy

EXACT, FLOAT32, FLOAT64, BFLOAT16 = 0.0, 1e-6, 1e-12, 2**-6
"""How far weights may end apart, relative to how far they have moved.

FLOAT32 and FLOAT64 where tanh is differentiated, whose slope is written so that saturated units keep its digits, and
where a mean is over a number of samples that is no power of two. BFLOAT16 under autocast: errors are pulled back in
float32, backprop's in the eight bits of bfloat16.
"""


class Module(L.LightningModule):
    """Its step, its optimizers and its loaders are the case's."""

    def __init__(self, case: Case, net: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.step, self.optimizers_of, self.loaders = case.step, case.optimizers, case.loaders
        self.lr, self.batch_size = 0.02, 8
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.net = (case.net or net)()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self, batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        return self.optimizers_of(self)

    def train_dataloader(self) -> Any:
        return self.loaders(self.batch_size)


def cross_entropy(module: Module, batch: Any) -> Tensor:
    loss = F.cross_entropy(module(batch[0]), batch[1])
    module.log("loss", loss, on_step=True, on_epoch=True)
    return loss


def adam(module: Module) -> Any:
    return torch.optim.Adam(module.parameters(), module.lr)


@dataclass
class Case:
    """What a Trainer, a module or its data do out of the ordinary.

    Args:
        settings: of the Trainer.
        callbacks: made anew for each run.
        step: the training step.
        optimizers: what ``configure_optimizers`` returns.
        loaders: of a batch size, the training data.
        net: the network, where it is another one.
        tuned: what a Tuner does before.
        within: the greatest deviation, relative to how far the weights move.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], list[Any]] = list
    step: Callable[[Module, Any], Any] = cross_entropy
    optimizers: Callable[[Module], Any] = adam
    loaders: Callable[[int], Any] = lambda size: loader(batch_size=size)
    net: Callable[[], nn.Module] | None = None
    tuned: Callable[[Tuner, L.LightningModule], Any] = lambda tuner, module: None
    within: float = EXACT


def plateau(module: Module) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), 0.2)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_accuracy"}}


def groups(module: Module) -> Any:
    weights_, biases = ([p for p in module.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False))
    rates = [{"params": weights_, "lr": 0.05, "weight_decay": 0.01}, {"params": biases, "lr": 0.2}]
    return torch.optim.SGD(rates, lr=0.1, momentum=0.9, nesterov=True)


def each_step(module: Module) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    scheduler = lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=10)
    return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def lbfgs(module: Module) -> Any:
    return torch.optim.LBFGS(module.parameters(), 0.1, max_iter=4)


def mixup(module: Module, batch: Any) -> Tensor:
    x, y = batch
    share, order = float(torch.rand(())), torch.randperm(len(x))
    soft = share * F.one_hot(y, 3) + (1 - share) * F.one_hot(y[order], 3)
    return F.cross_entropy(module(share * x + (1 - share) * x[order]), soft)


def as_dict(module: Module, batch: Any) -> dict[str, Tensor]:
    logits = module(batch[0])
    return {"loss": F.cross_entropy(logits, batch[1], label_smoothing=0.1), "logits": logits, "labels": batch[1]}


def of_both(module: Module, batch: Any) -> Tensor:
    parts = batch.values() if isinstance(batch, dict) else batch
    x, y = (torch.cat(each) for each in zip(*(p for p in parts if p is not None)))
    return F.cross_entropy(module(x), y)


def sgd(module: Module) -> Any:
    return torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)


def long(size: int) -> Any:
    return loader(clusters(40 * size), size)


def batch_size_found(tuner: Tuner, module: L.LightningModule) -> Any:
    return tuner.scale_batch_size(module, val_dataloaders=loader(), steps_per_trial=2, init_val=2, max_trials=2)


def now_and_then(module: Module, batch: Any) -> Tensor | None:
    return None if batch[1][0] == 0 else cross_entropy(module, batch)


class Recomputed(nn.Module):
    """Its first half is run again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.first, x, use_reentrant=False).tanh())


class Unfreezing(BaseFinetuning):
    """The first layer learns from the second epoch on."""

    def freeze_before_training(self, pl_module: L.LightningModule) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: L.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)


def trainable(module: Module) -> Any:
    return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.1)


def chain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(inplace=True), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


def tanhs() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))


def maps() -> nn.Module:
    """Convolution, batch statistics, pooling by maxima and dropout."""
    front = [nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.MaxPool1d(2)]
    return nn.Sequential(nn.Sequential(*front), nn.Flatten(), nn.Dropout(0.3), nn.Linear(8, 3))


NETS: dict[str, Callable[[], nn.Module]] = {"chain": chain, "maps": maps}


def pairs(mode: str) -> Callable[[int], Any]:
    return lambda size: CombinedLoader({"a": loader(batch_size=size), "b": loader(clusters(24, 3), size)}, mode)


CASES: dict[str, Case] = {
    "nothing": Case(),
    "averaged weights, SWA": Case({"max_epochs": 4}, lambda: [StochasticWeightAveraging(0.05, 2)]),
    **(
        {"averaged weights, EMA": Case(callbacks=lambda: [callbacks.EMAWeightAveraging(decay=0.8)])}
        if hasattr(callbacks, "EMAWeightAveraging")
        else {}
    ),
    "accumulated": Case({"accumulate_grad_batches": 2}),
    "accumulated by schedule": Case(callbacks=lambda: [GradientAccumulationScheduler({0: 1, 1: 4})]),
    "clipped by norm": Case({"gradient_clip_val": 0.1}),
    "clipped by value": Case({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "overfitted": Case({"overfit_batches": 2}),
    "fast dev run": Case({"fast_dev_run": 3}),
    "L-BFGS": Case(optimizers=lbfgs),
    "rate by plateau": Case({"max_epochs": 4}, optimizers=plateau),
    "rate by step": Case(optimizers=each_step),
    "groups of parameters": Case(optimizers=groups),
    "fused Adam": Case(optimizers=lambda module: torch.optim.AdamW(module.parameters(), 0.02, fused=True)),
    "Adam, all at once": Case(optimizers=lambda module: torch.optim.Adam(module.parameters(), 0.02, foreach=True)),
    "unfrozen midway": Case(callbacks=lambda: [Unfreezing()], optimizers=trainable),
    "mixup": Case(step=mixup),
    "a dict with tensors": Case(step=as_dict),
    "batches skipped": Case(step=now_and_then),
    "rate found": Case(tuned=lambda tuner, module: tuner.lr_find(module, num_training=30), loaders=long),
    "batch size found": Case(tuned=batch_size_found),
    "two loaders, shorter": Case(step=of_both, loaders=pairs("min_size")),
    "two loaders, longer": Case(step=of_both, loaders=pairs("max_size")),
    "two loaders, cycled": Case(step=of_both, loaders=pairs("max_size_cycle")),
    "shuffled": Case(loaders=lambda size: loader(batch_size=size, shuffle=True)),
    "some batches": Case({"limit_train_batches": 3}),
    "a share of the batches": Case({"limit_train_batches": 0.4}),
    "a number of steps": Case({"max_steps": 7, "max_epochs": -1}),
    "validated in between": Case({"val_check_interval": 2}),
    "validated by share": Case({"val_check_interval": 0.4}),
    "stopped early": Case({"max_epochs": 8}, lambda: [EarlyStopping("loss", patience=0, mode="max")]),
    "checkpoints": Case(
        {"enable_checkpointing": True}, lambda: [ModelCheckpoint(every_n_train_steps=2, save_top_k=-1)]
    ),
    "recomputed in backward": Case(net=Recomputed, within=FLOAT32),
    "deterministic": Case({"deterministic": True}),
    "anomalies detected": Case({"detect_anomaly": True}),
    "no inference mode": Case({"inference_mode": False}),
    "sanity checked": Case({"num_sanity_val_steps": 2}),
    "64-true": Case({"precision": "64-true"}),
    "bf16-mixed": Case({"precision": "bf16-mixed"}, optimizers=sgd, within=BFLOAT16),
    "tanh": Case(net=tanhs, within=FLOAT32),
    "tanh, 64-true": Case({"precision": "64-true"}, net=tanhs, within=FLOAT64),
    "batches of seven": Case(loaders=lambda size: loader(batch_size=7), within=FLOAT32),
    "batches of seven, 64-true": Case(
        {"precision": "64-true"}, loaders=lambda size: loader(batch_size=7), within=FLOAT64
    ),
}
SAME_NET = [name for name, case in CASES.items() if case.net is None]


def trained(name: str, net: str, strategy: Any, folder: Any) -> tuple[Module, L.Trainer]:
    case = CASES[name]
    L.seed_everything(3, verbose=False)
    module = Module(case, NETS[net])
    trainer = quiet(strategy, callbacks=case.callbacks(), default_root_dir=folder, **case.settings)
    case.tuned(Tuner(trainer), module)
    L.seed_everything(5, verbose=False)
    trainer.fit(module, val_dataloaders=loader(clusters(16, 1)))
    return module, trainer


@pytest.mark.parametrize(
    ("net", "name"),
    [*(("chain", name) for name in CASES), *(pytest.param("maps", name, marks=pytest.mark.slow) for name in SAME_NET)],
)
def test_backprop_under_the_strategy_ends_where_plain_lightning_does(net, name, tmp_path):
    (plain, a), (ours, b) = (
        trained(name, net, chosen, tmp_path / str(k)) for k, chosen in enumerate(["auto", DFCStrategy(rule=Backprop())])
    )
    assert (a.global_step, a.current_epoch, plain.lr) == (b.global_step, b.current_epoch, ours.lr) and a.global_step
    theirs, apart = weights(plain), weights(plain) - weights(ours)
    moved = theirs - weights(Module(CASES[name], NETS[net])).to(theirs)
    assert moved.norm() > 1e-3 and apart.norm() <= CASES[name].within * moved.norm()
    assert not differing(dict(plain.named_buffers()), dict(ours.named_buffers())) or CASES[name].within
