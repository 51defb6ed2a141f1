"""Models as people have them, each with real data to learn, for ``architectures.py``."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import Tensor, nn

from dfc_lightning.data import CIFAR10, Digits, Documentation
from dfc_lightning.data.documentation import KINDS
from dfc_lightning.models import GPT
from dfc_lightning.network.controlled_network import Output

Batch = tuple[Tensor, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Model:
    """A network of somebody's, and what it is to learn.

    Args:
        make: makes the network.
        data: inputs and targets.
        loss: the loss of a batch, as a training step has it.
        batch_size: samples in a batch.
        output: what the network's output is; see :class:`ControlledNetwork`.
    """

    make: Callable[[], nn.Module]
    data: Callable[[], Batch]
    loss: Loss
    batch_size: int = 16
    output: Output = "first"


def classified(net: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy of what the network returns."""
    return F.cross_entropy(net(batch[0]), batch[1])


# Data


@cache
def images(size: int = 32) -> Batch:
    """The first photographs of CIFAR-10, larger or smaller."""
    data = CIFAR10(validation_size=0)
    data.setup()
    x, y = data.train_set.inputs[:1600], data.train_set.targets[:1600]
    return (x if size == 32 else F.interpolate(x, size=(size, size), mode="bilinear")), y


@cache
def digits() -> Batch:
    """8 × 8 digits, 64 numbers from 0 to 1 each."""
    data = Digits(validation_size=0, standardize=False)
    data.setup()
    return data.train_set.inputs.flatten(1), data.train_set.targets


@cache
def text() -> Batch:
    """Pieces of Python's documentation, and the same a character later."""
    data = Documentation()
    data.setup()
    return data.train_set.inputs, data.train_set.targets


@cache
def topics(length: int = 32, kinds: int = 8) -> Batch:
    """Pieces of the longest topics in words of the commonest 500, and which topic they are from."""
    longest = sorted(pydoc_data.topics.topics.values(), key=len)[-kinds:]
    words = " ".join(longest).split()
    common = {w: k + 1 for k, w in enumerate(sorted(set(words), key=lambda w: (-words.count(w), w))[:499])}
    x, y = [], []
    for k, topic in enumerate(longest):
        coded = [common.get(w, 0) for w in topic.split()]
        pieces = torch.tensor(coded[: len(coded) // length * length]).view(-1, length)
        x, y = [*x, pieces], [*y, torch.full((len(pieces),), k)]
    order = torch.randperm(sum(map(len, y)), generator=torch.Generator().manual_seed(0))
    return torch.cat(x)[order], torch.cat(y)[order]


# Networks


class Rows(nn.Module):
    """An image as a sequence of its rows, read by a recurrent layer."""

    def __init__(self, kind: type[nn.RNNBase], width: int = 48) -> None:
        super().__init__()
        self.reads, self.head = kind(8, width, batch_first=True), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Digits (B, 64) to logits."""
        return self.head(self.reads(x.view(-1, 8, 8))[0][:, -1])


class Elman(nn.Module):
    """The same by two layers, called at every step."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.hears, self.recalls, self.head = nn.Linear(8, width), nn.Linear(width, width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Digits (B, 64) to logits."""
        h = x.new_zeros(len(x), self.recalls.in_features)
        for row in x.view(-1, 8, 8).unbind(1):
            h = torch.tanh(self.hears(row) + self.recalls(h))
        return self.head(h)


class UNet(nn.Module):
    """Down, across and up again, with a bridge (Ronneberger et al. 2015, small); maps of three kinds of pixels."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())

        self.down, self.across, self.after = block(3, width), block(width, 2 * width), block(2 * width, width)
        self.up, self.pool = nn.ConvTranspose2d(2 * width, width, 2, stride=2), nn.MaxPool2d(2)
        self.head = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits (B, 3, H, W)."""
        h = self.down(x)
        return self.head(self.after(torch.cat([h, self.up(self.across(self.pool(h)))], dim=1)))


def shades(x: Tensor) -> Tensor:
    """Whether a pixel is darker than most, lighter than most, or neither, after a blur: what a U-Net is to say."""
    grey = F.avg_pool2d(x.mean(1, keepdim=True), 5, 1, 2).squeeze(1)
    low, high = (grey.flatten(1).quantile(q, dim=1).view(-1, 1, 1) for q in (1 / 3, 2 / 3))
    return (grey > low).long() + (grey > high).long()


class VAE(nn.Module):
    """A variational autoencoder of digits (Kingma and Welling 2014)."""

    def __init__(self, width: int = 64, code: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 2 * code))
        self.decoder = nn.Sequential(nn.Linear(code, width), nn.ReLU(), nn.Linear(width, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Digits to what they are made to again, and mean and log-variance of the code."""
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        code = mean + torch.exp(log_variance / 2) * torch.randn_like(mean)
        return self.decoder(code), mean, log_variance


def evidence(net: nn.Module, batch: Batch) -> Tensor:
    """The negative of the lower bound that a VAE raises."""
    x = batch[0]
    again, mean, log_variance = net(x)
    divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1)
    return (F.mse_loss(again, x, reduction="none").sum(1) + 0.1 * divergence).mean()


class Table(nn.Module):
    """Columns of kinds, each embedded, and columns of numbers (Guo and Berkhahn 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds = nn.ModuleList(nn.Embedding(5, 4) for _ in range(32))
        self.layers = nn.Sequential(nn.Linear(160, 64), nn.ReLU(), nn.BatchNorm1d(64), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Digits, every other pixel of which is taken for one of five kinds."""
        kinds = (4 * x[:, ::2]).long()
        found = [table(column) for table, column in zip(self.kinds, kinds.unbind(1))]
        return self.layers(torch.cat([*found, x[:, 1::2]], dim=1))


def of_timm(name: str, **options: object) -> nn.Module:
    """A network of timm's."""
    import timm

    return timm.create_model(name, num_classes=10, **options)  # type: ignore[no-any-return]


def bert() -> nn.Module:
    """BERT of two layers, from the start."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=500,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=8,
        max_position_embeddings=32,
    )
    return transformers.BertForSequenceClassification(config)


def with_auxiliaries(net: nn.Module, batch: Batch) -> Tensor:
    """GoogLeNet's own loss: two more heads on the way, at 0.3."""
    found = net(batch[0])
    heads = zip(found, (1.0, 0.3, 0.3))
    return sum((w * F.cross_entropy(each, batch[1]) for each, w in heads), start=torch.zeros(()))


SMALL = {"num_classes": 10}
VIT = {"image_size": 32, "patch_size": 8, "num_layers": 4, "num_heads": 4, "hidden_dim": 64, "mlp_dim": 128}

MODELS: dict[str, Model] = {
    "torchvision VisionTransformer": Model(partial(tv.VisionTransformer, **VIT, **SMALL), images, classified),
    "torchvision swin_t": Model(partial(tv.swin_t, **SMALL), images, classified),
    "torchvision convnext_tiny": Model(partial(tv.convnext_tiny, **SMALL), images, classified),
    "torchvision mobilenet_v2": Model(partial(tv.mobilenet_v2, **SMALL), images, classified),
    "torchvision efficientnet_b0": Model(partial(tv.efficientnet_b0, **SMALL), images, classified),
    "torchvision densenet121": Model(partial(tv.densenet121, **SMALL), images, classified),
    "torchvision googlenet": Model(
        partial(tv.googlenet, init_weights=False, aux_logits=True, **SMALL), partial(images, 64), with_auxiliaries
    ),
    "timm vit_tiny": Model(
        partial(of_timm, "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4), images, classified
    ),
    "timm mixer_s32": Model(partial(of_timm, "mixer_s32_224", img_size=64), partial(images, 64), classified),
    "timm efficientnet_lite0": Model(partial(of_timm, "efficientnet_lite0"), images, classified),
    "transformers BERT": Model(bert, topics, lambda net, b: F.cross_entropy(net(input_ids=b[0]).logits, b[1])),
    "GPT, tied embeddings": Model(
        partial(GPT, KINDS), text, lambda net, b: F.cross_entropy(net(b[0]).flatten(0, 1), b[1].flatten())
    ),
    "LSTM": Model(partial(Rows, nn.LSTM), digits, classified),
    "GRU": Model(partial(Rows, nn.GRU), digits, classified),
    "Elman": Model(Elman, digits, classified),
    "U-Net": Model(UNet, images, lambda net, b: F.cross_entropy(net(b[0]), shades(b[0]))),
    "VAE": Model(VAE, digits, evidence, output="returned"),
    "tabular": Model(Table, digits, classified),
}
