from __future__ import annotations

from torch import nn

from dfc_lightning.models.mlp import nonlinearity_named


class LeNet(nn.Sequential):
    """LeNet-5 with max-pooling: two convolutions, three dense layers; linear output.

    Takes images of shape (B, in_channels, size, size) and returns logits of shape (B, num_classes).

    Args:
        in_channels: Channels of an image: 1 for grey, 3 for colour.
        size: Height and width of an image, 28 or 32. Images of 28x28 pixels are padded to 32x32 by the first
            convolution.
        num_classes: Number of classes.
        nonlinearity: After every layer but the last; a name as for ``MLP``.

    Example:
        >>> import torch
        >>> LeNet()(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 10])
    """

    def __init__(self, in_channels: int = 1, size: int = 28, num_classes: int = 10, nonlinearity: str = "relu") -> None:
        if size not in (28, 32):
            raise ValueError(f"size={size} is not a size of images that LeNet is for. Give 28 or 32.")
        phi = nonlinearity_named(nonlinearity)
        super().__init__(
            nn.Conv2d(in_channels, 6, 5, padding=(32 - size) // 2),
            phi(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            phi(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * 5 * 5, 120),
            phi(),
            nn.Linear(120, 84),
            phi(),
            nn.Linear(84, num_classes),
        )
