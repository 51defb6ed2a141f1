from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions with batch normalisation, and what they hear added to what they say.

    Args:
        inputs: Channels of its input.
        outputs: Channels of its output.
        stride: Of the first convolution. Where the shapes of input and output differ, the shortcut is a 1x1
            convolution with batch normalisation.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if inputs != outputs or stride != 1:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class ResNet(nn.Module):
    """A small residual network for small images, after He et al. (2016), section 4.2.

    A 3x3 convolution, then stages of blocks, each stage but the first at half the resolution of the one before, then
    the mean over positions and a dense layer. Takes images of shape (B, in_channels, H, W) and returns logits of shape
    (B, num_classes). Three blocks a stage, the default, are ResNet-20; shortcuts that change the shape
    are convolutions, with parameters of their own.

    Args:
        in_channels: Channels of an image.
        num_classes: Number of classes.
        blocks: Blocks of each stage.
        widths: Channels of each stage.

    Example:
        >>> import torch
        >>> ResNet(blocks=1)(torch.zeros(5, 3, 32, 32)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        blocks: int = 3,
        widths: tuple[int, ...] = (16, 32, 64),
    ) -> None:
        super().__init__()
        if blocks < 1 or len(widths) == 0:
            raise ValueError(f"blocks={blocks} and widths={widths} must give at least one block in at least one stage.")
        self.conv = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        stages = [_stage(widths[0], widths[0], blocks, stride=1)]
        stages += [_stage(before, width, blocks, stride=2) for before, width in pairwise(widths)]
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (B, num_classes) of images of shape (B, in_channels, H, W)."""
        maps = self.stages(F.relu(self.norm(self.conv(x))))
        return self.head(F.adaptive_avg_pool2d(maps, 1).flatten(1))


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(Block(inputs, outputs, stride), *(Block(outputs, outputs) for _ in range(blocks - 1)))
