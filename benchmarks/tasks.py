"""The networks, data and optimizers that the defaults are judged by: one row of the table each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dfc_lightning.data import CIFAR10, MNIST, FashionMNIST, TensorPairs
from dfc_lightning.models import MLP, LeNet, ResNet

Split = tuple[TensorPairs, TensorPairs]
Optimizer = Callable[..., torch.optim.Optimizer]


@dataclass(frozen=True)
class Task:
    """A network to train on data, held-out data to judge it by, and what backprop trains it with.

    Args:
        data: training and test samples.
        network: makes the network.
        optimizer: makes the optimizer from the parameters.
        epochs: to train for.
        loss: mean loss of outputs and targets.
        batch_size: samples in a training batch.
        error: whether the figure is the test error in percent, not the test loss.
    """

    data: Callable[[], Split]
    network: Callable[[], nn.Module]
    optimizer: Optimizer
    epochs: int
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    batch_size: int = 128
    error: bool = True


class Module(L.LightningModule):
    """A user's module for a task."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task, self.network = task, task.network()

    def forward(self, x: Tensor) -> Tensor:
        """The network's output."""
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The batch's loss."""
        return self.task.loss(self.network(batch[0]), batch[1])

    def train_dataloader(self) -> DataLoader:
        """Batches of the task's training samples, in an order of the run's seed."""
        pairs = self.task.data()[0]
        return DataLoader(pairs, self.task.batch_size, shuffle=True, drop_last=True, collate_fn=pairs.collate)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The task's optimizer over all parameters."""
        return self.task.optimizer(self.parameters())

    @torch.no_grad()
    def judged(self) -> float:
        """The test error in percent, or the test loss."""
        self.eval()
        pairs, batch = self.task.data()[1], 500
        total = 0.0
        for x, y in zip(pairs.inputs.split(batch), pairs.targets.split(batch)):
            output = self.network(x)
            if not self.task.error:
                total += float(self.task.loss(output, y)) * len(x)
            elif output.shape[1] == 1:
                total += float(((output > 0) != (y > 0.5)).sum()) * 100
            else:
                total += float((output.argmax(1) != y).sum()) * 100
        return total / len(pairs)


# Data

_HELD: dict[object, Split] = {}


def _once(name: str, make: Callable[[], Split]) -> Callable[[], Split]:
    def data() -> Split:
        if name not in _HELD:
            _HELD[name] = make()
        return _HELD[name]

    return data


def _images(kind: type, train: int) -> Callable[[], Split]:
    def make() -> Split:
        data = kind(validation_size=0)
        data.setup()
        pairs, test = data.train_set, data.test_set
        return TensorPairs(pairs.inputs[:train], pairs.targets[:train]), TensorPairs(
            test.inputs[:5000], test.targets[:5000]
        )

    return _once(f"{kind.__name__} {train}", make)


def _autoencoder() -> Split:
    """The inputs of the first ``train`` digits for targets."""
    data = _images(MNIST, 12_800)()
    return tuple(TensorPairs(p.inputs.flatten(1), p.inputs.flatten(1)) for p in data)  # type: ignore[return-value]


def _bottleneck() -> Split:
    """Sigmoids of three hidden causes in 300 pixels."""
    g = torch.Generator().manual_seed(0)
    x = torch.sigmoid(3 * torch.randn(7400, 3, generator=g).tanh() @ torch.randn(3, 300, generator=g))
    return TensorPairs(x[:6400], x[:6400]), TensorPairs(x[6400:], x[6400:])


def _friedman() -> Split:
    """Friedman's first regression problem (1991), targets standardised."""
    x = torch.rand(3000, 10, generator=torch.Generator().manual_seed(0))
    y = 10 * torch.sin(math.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    y = ((y - y.mean()) / y.std()).unsqueeze(1)
    return TensorPairs(x[:2000], y[:2000]), TensorPairs(x[2000:], y[2000:])


def _moons() -> Split:
    """Two interleaved half circles with noise; labels 0 and 1."""
    g = torch.Generator().manual_seed(0)
    angle, label = math.pi * torch.rand(3000, generator=g), torch.arange(3000) % 2
    sign = 1 - 2 * label
    x = torch.stack([sign * angle.cos() + label, sign * angle.sin() + 0.5 * label], dim=1)
    x = x + 0.2 * torch.randn(3000, 2, generator=g)
    y = label.float().unsqueeze(1)
    return TensorPairs(x[:1000], y[:1000]), TensorPairs(x[1000:], y[1000:])


# Networks


class Residual(nn.Module):
    """Two 3x3 convolutions with batch normalisation around which the input is added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to the same."""
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))) + x)


def residual_net() -> nn.Module:
    """A strided convolution and two residual blocks of 16 channels."""
    stem = nn.Conv2d(1, 16, 5, stride=2, padding=2, bias=False)
    blocks = Residual(16), Residual(16)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    return nn.Sequential(stem, nn.BatchNorm2d(16), nn.ReLU(), *blocks, *head)


def small_cnn() -> nn.Module:
    """Two convolutions with max-pooling and two dense layers."""
    first = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    second = nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(), nn.Linear(64, 10))


def bottleneck(width: int, hidden: int, narrow: int) -> nn.Module:
    """An autoencoder with ReLU whose code is linear."""
    encoder = nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, narrow)
    return nn.Sequential(*encoder, nn.Linear(narrow, hidden), nn.ReLU(), nn.Linear(hidden, width))


def _adam(lr: float) -> Optimizer:
    return partial(torch.optim.Adam, lr=lr)


def _momentum(lr: float) -> Optimizer:
    return partial(torch.optim.SGD, lr=lr, momentum=0.9)


def _mlp(depth: int, nonlinearity: str) -> Callable[[], nn.Module]:
    widths = [784, *[256] * (depth - 1), 10]
    return lambda: nn.Sequential(nn.Flatten(), *MLP(widths, nonlinearity))


MNIST_SUBSET, FASHION_SUBSET, CIFAR_SUBSET = (
    _images(MNIST, 12_800),
    _images(FashionMNIST, 12_800),
    _images(CIFAR10, 6_400),
)
FRIEDMAN = partial(Task, _once("friedman1", _friedman), partial(MLP, [10, 64, 64, 1], "tanh"), loss=F.mse_loss)
MOONS = partial(
    Task, _once("two moons", _moons), partial(MLP, [2, 32, 32, 1], "tanh"), loss=F.binary_cross_entropy_with_logits
)

TASKS: dict[str, Task] = {
    **{
        f"MLP {depth} {phi}, MNIST, Adam 1e-3": Task(MNIST_SUBSET, _mlp(depth, phi), _adam(1e-3), 5)
        for phi in ("tanh", "relu")
        for depth in (2, 4, 8)
    },
    "MLP 4 tanh, MNIST, Adam 3e-3": Task(MNIST_SUBSET, _mlp(4, "tanh"), _adam(3e-3), 5),
    "MLP 4 relu, MNIST, SGD 0.05": Task(MNIST_SUBSET, _mlp(4, "relu"), _momentum(0.05), 5),
    "LeNet, Fashion, Adam 1e-3": Task(FASHION_SUBSET, LeNet, _adam(1e-3), 5),
    "LeNet, Fashion, Adam 3e-3": Task(FASHION_SUBSET, LeNet, _adam(3e-3), 5),
    "LeNet, MNIST, Adam 3e-3": Task(MNIST_SUBSET, LeNet, _adam(3e-3), 5),
    "CNN, Fashion, SGD 0.02": Task(FASHION_SUBSET, small_cnn, _momentum(0.02), 4),
    "Residual, Fashion, Adam 1e-3": Task(FASHION_SUBSET, residual_net, _adam(1e-3), 2),
    "Residual, Fashion, Adam 3e-3": Task(FASHION_SUBSET, residual_net, _adam(3e-3), 2),
    "Residual, Fashion, Adam 1e-2": Task(FASHION_SUBSET, residual_net, _adam(1e-2), 2),
    "ResNet-8, CIFAR-10, Adam 3e-3": Task(CIFAR_SUBSET, partial(ResNet, blocks=1), _adam(3e-3), 2),
    "ResNet-20, CIFAR-10, Adam 3e-3": Task(CIFAR_SUBSET, partial(ResNet, blocks=3), _adam(3e-3), 1),
    "Autoencoder 300-64-3, Adam 1e-2": Task(
        _once("bottleneck", _bottleneck),
        partial(bottleneck, 300, 64, 3),
        _adam(1e-2),
        3,
        F.mse_loss,
        batch_size=32,
        error=False,
    ),
    "Autoencoder 784-64-3, MNIST, Adam 1e-3": Task(
        _once("autoencoder", _autoencoder), partial(bottleneck, 784, 64, 3), _adam(1e-3), 5, F.mse_loss, error=False
    ),
    "friedman1, Adam 3e-3": FRIEDMAN(_adam(3e-3), 40, batch_size=32, error=False),
    "friedman1, SGD 0.01": FRIEDMAN(_momentum(0.01), 40, batch_size=32, error=False),
    "two moons, Adam 3e-3": MOONS(_adam(3e-3), 40, batch_size=32),
    "two moons, SGD 0.05": MOONS(_momentum(0.05), 40, batch_size=32),
}
