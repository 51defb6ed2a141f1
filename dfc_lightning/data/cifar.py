"""CIFAR-10 and CIFAR-100, read straight from their files, with augmentation of whole batches."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dfc_lightning.data.checks import DataError, require_finite
from dfc_lightning.data.images import Images
from dfc_lightning.data.tensors import TensorPairs


class _ColourImages(Images):
    """What CIFAR-10 and CIFAR-100 share: colour images of 32x32 pixels, shifted and mirrored while training."""

    labels: ClassVar[str]
    """Their key in a file."""
    image_shape = (3, 32, 32)
    training_images = 50_000

    def __init__(
        self,
        root: str | os.PathLike | None = None,
        batch_size: int = 128,
        validation_size: int = 5000,
        standardize: bool = True,
        augment: bool = True,
        seed: int = 0,
        eval_batch_size: int = 1000,
        num_workers: int = 0,
        shuffle: bool = True,
    ) -> None:
        super().__init__(root, batch_size, validation_size, standardize, seed, eval_batch_size, num_workers, shuffle)
        self.augment = augment

    def _training_pairs(self, inputs: Tensor, targets: Tensor) -> TensorPairs:
        return (ShiftedAndMirrored if self.augment else TensorPairs)(inputs, targets)

    def _read(self, paths: Sequence[Path]) -> tuple[Tensor, Tensor]:
        images, labels = zip(*(_read_batch(path, self.dataset, self.labels) for path in paths))
        return torch.cat(images), torch.cat(labels)


class CIFAR10(_ColourImages):
    """CIFAR-10: 50,000 training and 10,000 test colour images in ten classes.

    A batch is an input of shape (B, 3, 32, 32), float32, and labels of shape (B,), int64. Files that are already
    there are only read; otherwise torchvision downloads them.

    Args:
        root: Folder that holds ``cifar-10-batches-py``. By default the environment variable ``DFC_DATA_ROOT``, or
            ``data``.
        batch_size: Samples in a training batch.
        validation_size: Training images held out for validation; 0 leaves no validation set.
        standardize: Whether to subtract its mean from each colour and divide it by its standard deviation. Otherwise
            pixels lie in [0, 1].
        augment: Whether training images are shifted by up to four pixels, zeros coming in, and mirrored at random.
        seed: Seed of the split, which is independent of PyTorch's global generator.
        eval_batch_size: Samples in a validation or test batch.
        num_workers: Processes that load batches; 0 loads in the main process.
        shuffle: Whether each training epoch visits the samples in a new order.
    """

    dataset, place, labels = "CIFAR10", "cifar-10-batches-py", "labels"
    files = {"train": tuple(f"data_batch_{k}" for k in range(1, 6)), "test": ("test_batch",)}
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class CIFAR100(_ColourImages):
    """CIFAR-100: 50,000 training and 10,000 test colour images in a hundred classes.

    A batch is an input of shape (B, 3, 32, 32), float32, and labels of shape (B,), int64, of the fine classes. Files
    that are already there are only read; otherwise torchvision downloads them.

    Args:
        root: Folder that holds ``cifar-100-python``. By default the environment variable ``DFC_DATA_ROOT``, or
            ``data``.
        batch_size: Samples in a training batch.
        validation_size: Training images held out for validation; 0 leaves no validation set.
        standardize: Whether to subtract its mean from each colour and divide it by its standard deviation. Otherwise
            pixels lie in [0, 1].
        augment: Whether training images are shifted by up to four pixels, zeros coming in, and mirrored at random.
        seed: Seed of the split, which is independent of PyTorch's global generator.
        eval_batch_size: Samples in a validation or test batch.
        num_workers: Processes that load batches; 0 loads in the main process.
        shuffle: Whether each training epoch visits the samples in a new order.
    """

    dataset, place, labels, classes = "CIFAR100", "cifar-100-python", "fine_labels", 100
    files = {"train": ("train",), "test": ("test",)}
    mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


class ShiftedAndMirrored(TensorPairs):
    """Image pairs, each image shifted and mirrored at random whenever it is fetched, by the global generator.

    Args:
        inputs: Shape (N, C, H, W).
        targets: Shape (N, ...).
        reach: Pixels by which an image is shifted at most, in either direction.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, reach: int = 4) -> None:
        super().__init__(inputs, targets)
        self.reach = reach

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        inputs, targets = super().__getitems__(indices)
        batch, _, height, width = inputs.shape
        windows = F.pad(inputs, [self.reach] * 4).unfold(2, height, 1).unfold(3, width, 1)
        down, right = torch.randint(2 * self.reach + 1, (2, batch))
        shifted = windows[torch.arange(batch), :, down, right]
        return torch.where(torch.rand(batch, 1, 1, 1) < 0.5, shifted.flip(3), shifted), targets


class _Arrays(pickle.Unpickler):
    """Makes numpy arrays, and nothing else that a pickle may ask for."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.partition(".")[0], name) in _WANTED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it wants {module}.{name}")


_WANTED = {("numpy", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}


def _read_batch(path: Path, dataset: str, labelled: str) -> tuple[Tensor, Tensor]:
    """Read a pickled dictionary of pixels, rows of red, then green, then blue, and of labels."""
    try:
        with open(path, "rb") as file:
            content = _Arrays(file, encoding="latin1").load()
        images, labels = torch.as_tensor(content["data"]), torch.as_tensor(content[labelled])
        require_finite(images, f"{path} is damaged: its pixels")
        if images.dtype != torch.uint8:
            raise ValueError(f"its pixels are {images.dtype}, not bytes")
        images = images.view(len(labels), 3, 32, 32)
    except (DataError, OSError):
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(f"{path} is damaged: not a batch of {dataset} ({error}). Replace it.") from error
    return images, labels
