from __future__ import annotations

from itertools import pairwise
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

Shortcuts = Literal["convolution", "padding"]


class Block(nn.Module):
    """Two 3x3 convolutions with batch normalisation, and what they hear added to what they say.

    Args:
        inputs: Channels of its input.
        outputs: Channels of its output.
        stride: Of the first convolution.
        shortcuts: What the shortcut is where the shapes of input and output differ: a 1x1 convolution with batch
            normalisation, or every ``stride``-th position with channels of zeros around.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1, shortcuts: Shortcuts = "convolution") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Sequential()
        if inputs != outputs or stride != 1:
            if shortcuts == "padding":
                self.shortcut = Padding(outputs - inputs, stride)
            else:
                convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
                self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class Padding(nn.Module):
    """Every ``stride``-th position, with channels of zeros, half of them before and half after: no parameters.

    Args:
        channels: How many to add.
        stride: In both directions.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, C + channels, H / stride, W / stride)."""
        before = self.channels // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.channels - before))


class ResNet(nn.Module):
    """A small residual network for small images, after He et al. (2016), section 4.2.

    A 3x3 convolution, then stages of blocks, each stage but the first at half the resolution of the one before, then
    the mean over positions and a dense layer. Takes images of shape (B, in_channels, H, W) and returns logits of shape
    (B, num_classes). Three blocks a stage, the default, are ResNet-20; with ``shortcuts="padding"`` it is that of He et
    al., option A, and of biotorch (github.com/jsalbert/biotorch).

    Args:
        in_channels: Channels of an image.
        num_classes: Number of classes.
        blocks: Blocks of each stage.
        widths: Channels of each stage, no fewer than those of the stage before.
        shortcuts: Those that change the shape: ``"convolution"``, with parameters of their own, or ``"padding"``.

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
        shortcuts: Shortcuts = "convolution",
    ) -> None:
        super().__init__()
        if blocks < 1 or len(widths) == 0:
            raise ValueError(f"blocks={blocks} and widths={widths} must give at least one block in at least one stage.")
        if shortcuts not in get_args(Shortcuts):
            raise ValueError(f"shortcuts={shortcuts!r} is unknown. Choose one of: {', '.join(get_args(Shortcuts))}.")
        if shortcuts == "padding" and any(before > width for before, width in pairwise(widths)):
            raise ValueError(f'widths={widths} shrink, which shortcuts="padding" cannot. Give shortcuts="convolution".')
        self.conv = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        stages = [_stage(widths[0], widths[0], blocks, 1, shortcuts)]
        stages += [_stage(before, width, blocks, 2, shortcuts) for before, width in pairwise(widths)]
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (B, num_classes) of images of shape (B, in_channels, H, W)."""
        maps = self.stages(F.relu(self.norm(self.conv(x))))
        return self.head(F.adaptive_avg_pool2d(maps, 1).flatten(1))


def _stage(inputs: int, outputs: int, blocks: int, stride: int, shortcuts: Shortcuts) -> nn.Sequential:
    first = Block(inputs, outputs, stride, shortcuts)
    return nn.Sequential(first, *(Block(outputs, outputs) for _ in range(blocks - 1)))
