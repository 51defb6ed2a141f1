"""LightningModules written with no thought of feedback control, tiny data, quiet trainers."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassAccuracy

from dfc_lightning import DFC, ControlledNetwork, DFCStrategy, FeedbackLearner, FeedbackLearning, Sampled

BATCHES, BATCH = 5, 8
NO_FEEDBACK = FeedbackLearning(initial_passes=0, passes_per_epoch=0)
SHORT = Sampled(steps=4)
LEARNING = FeedbackLearning(method=SHORT, initial_passes=1, passes_per_epoch=1)


def clusters(size: int = BATCHES * BATCH, seed: int = 0, dtype: torch.dtype = torch.float32) -> TensorDataset:
    """Three noisy clusters in six dimensions, and which of them each sample is of."""
    centres = 1.5 * torch.randn(3, 6, generator=torch.Generator().manual_seed(99))
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (size,), generator=g)
    return TensorDataset((centres[y] + torch.randn(size, 6, generator=g)).to(dtype), y)


def loader(data: Any = None, batch_size: int = BATCH, **settings: Any) -> DataLoader:
    return DataLoader(clusters() if data is None else data, batch_size, **settings)


class Outside:
    """A value of an object that is kept outside of it, where feedback passes do not put it back."""

    def __init__(self, make: Callable[[], Any] = list) -> None:
        self.make = make  # what an object has that was made in another process
        self.values: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        return self.values.setdefault(owner, self.make())

    def __set__(self, owner: Any, value: Any) -> None:
        self.values[owner] = value


class Innocent(L.LightningModule):
    """Returns a dict, logs before and after the forward pass, keeps metrics, has a scheduler and validation."""

    calls = Outside(int)

    def __init__(self, lr: float = 0.01, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.net = nn.Sequential(
                nn.Linear(6, 12), nn.ReLU(inplace=True), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)
            )
        self.accuracy, self.val_accuracy = MulticlassAccuracy(3), MulticlassAccuracy(3)
        self.samples = SumMetric()
        self.calls = 0
        self.at_call: Callable[[int], None] = lambda call: None

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.at_call(self.calls)
        self.calls += 1
        x, y = batch
        self.samples(len(x))
        self.log("samples", self.samples, on_step=True, on_epoch=True)
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log_dict({"loss": loss, "accuracy": self.accuracy}, on_step=False, on_epoch=True)
        return {"loss": loss, "logits": logits.detach()}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.val_accuracy(self(batch[0]), batch[1])
        self.log("val_accuracy", self.val_accuracy)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), self.hparams.lr)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}


class Plain(Innocent):
    """The same with the training step in another form."""

    def __init__(self, step: Callable[[Innocent, Any], Any] | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.step = step or (lambda module, batch: F.cross_entropy(module(batch[0]), batch[1]))

    def training_step(self, batch: Any) -> Any:
        return self.step(self, batch)


def quiet(strategy: Any = "auto", **settings: Any) -> L.Trainer:
    """A trainer that writes nothing and shows nothing."""
    defaults: dict[str, Any] = dict(
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        devices=1,
        num_sanity_val_steps=0,
    )
    return L.Trainer(strategy=strategy, **(defaults | settings))


def strategy(**settings: Any) -> DFCStrategy:
    """Direct DFC where no rule is given, with a seed, and short feedback learning where there is some to learn."""
    rule = settings.pop("rule", None) or DFC()
    learning = LEARNING if rule.feedback is not None else None
    return DFCStrategy(rule, **(dict(feedback=learning, seed=7) | settings))


def by_hand(
    module: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    scheduler: Any = None,
    epochs: int = 2,
    learning: FeedbackLearning = LEARNING,
    rule: Any = None,
    seed: int = 7,
) -> tuple[ControlledNetwork, FeedbackLearner]:
    """What the strategy is to do, as a loop of one's own."""
    net = ControlledNetwork(module, seed=seed)
    learner = FeedbackLearner(net, learning, seed)
    for _ in range(learning.initial_passes):
        for x, _ in batches:
            learner.step(net.observe(x), initial=True)
    for _ in range(epochs):
        for _ in range(learning.passes_per_epoch):
            for x, _ in batches:
                learner.step(net.observe(x))
        for k, (x, y) in enumerate(batches):
            with net.taught_by(rule or DFC()):
                loss = F.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if learning.every_n_batches and (k + 1) % learning.every_n_batches == 0:
                learner.step(net.observe(x))
        if scheduler is not None:
            scheduler.step()
    return net, learner


def saver(folder: Any) -> OnExceptionCheckpoint:
    """Saves a checkpoint when something is raised."""
    return OnExceptionCheckpoint(folder, "interrupted")


def differing(a: Any, b: Any, at: str = "") -> list[str]:
    """Where nested containers of tensors and numbers are not bitwise equal."""
    if isinstance(a, Tensor):
        return [] if isinstance(b, Tensor) and torch.equal(a, b) else [at]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict):
        return [f"{at}/{k}" for k in a.keys() ^ b.keys()] + [
            d for k in a.keys() & b.keys() for d in differing(a[k], b[k], f"{at}/{k}")
        ]
    return [] if a == b else [at]


def untouched(module: nn.Module) -> bool:
    """Whether no hook is left on the module or on anything in it."""
    return not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in module.modules())


def weights(module: nn.Module) -> Tensor:
    """All parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in module.parameters()])
