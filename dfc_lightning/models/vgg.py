from __future__ import annotations

from itertools import pairwise

from torch import nn

from dfc_lightning.models.mlp import nonlinearity_named


class VGG5(nn.Sequential):
    """The convolutional network of the PCX benchmark (Pinchetti et al., 2025): four convolutions, one dense layer.

    Each convolution, 3x3 with a bias, is followed by the nonlinearity and max-pooling by two. Takes images of shape
    (B, in_channels, size, size) and returns logits of shape (B, num_classes).

    Args:
        in_channels: Channels of an image.
        size: Height and width of an image, 16 or more.
        num_classes: Number of classes.
        nonlinearity: After every convolution; a name as for ``MLP``.
        widths: Channels of each convolution.

    Example:
        >>> import torch
        >>> VGG5()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_channels: int = 3,
        size: int = 32,
        num_classes: int = 10,
        nonlinearity: str = "gelu",
        widths: tuple[int, ...] = (128, 256, 512, 512),
    ) -> None:
        side = size // 2 ** len(widths)
        if side < 1:
            raise ValueError(
                f"size={size} is too small: {len(widths)} poolings leave nothing. Give {2 ** len(widths)} or more."
            )
        phi = nonlinearity_named(nonlinearity)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise((in_channels, *widths)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), phi(), nn.MaxPool2d(2)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(widths[-1] * side**2, num_classes))
