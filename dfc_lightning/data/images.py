"""Images from their files; MNIST and Fashion-MNIST, read straight from their IDX files, plain or gzipped."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from dfc_lightning.data.checks import DataError
from dfc_lightning.data.tensors import TensorDataModule, TensorPairs, random_split_indices


class Images(TensorDataModule):
    """Images in classes, read from the files that torchvision downloads.

    Args:
        root: folder that holds ``place``.
        batch_size: samples in a training batch.
        validation_size: training images held out for validation.
        standardize: whether to subtract ``mean`` from the pixels, scaled to [0, 1], and divide them by ``std``.
        seed: seed of the split.
        eval_batch_size: samples in a validation or test batch.
        num_workers: processes that load batches.
        shuffle: whether each training epoch visits the samples in a new order.
    """

    dataset: ClassVar[str]
    """Torchvision's name."""
    place: ClassVar[str]
    """Where the files lie below the root."""
    files: ClassVar[dict[str, Sequence[str]]]
    """Names of the files of the splits ``train`` and ``test``."""
    image_shape: ClassVar[tuple[int, int, int]]
    """(C, H, W)."""
    training_images: ClassVar[int]
    classes: ClassVar[int] = 10
    mean: ClassVar[float | tuple[float, ...]]
    """Of the pixels, scaled to [0, 1]; of each channel, where there are several."""
    std: ClassVar[float | tuple[float, ...]]

    def __init__(
        self,
        root: str | os.PathLike | None,
        batch_size: int,
        validation_size: int,
        standardize: bool,
        seed: int,
        eval_batch_size: int,
        num_workers: int,
        shuffle: bool,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, shuffle)
        if not 0 <= validation_size < self.training_images:
            raise ValueError(
                f"validation_size={validation_size} must lie between 0 and {self.training_images - 1}: "
                "it is taken from the training images."
            )
        self.root = Path(root or os.environ.get("DFC_DATA_ROOT") or "data").expanduser()
        self.validation_size = validation_size
        self.standardize = standardize
        self.seed = seed

    @property
    def raw(self) -> Path:
        """The folder of the files."""
        return self.root / self.place

    def is_there(self) -> bool:
        """Whether all files are there already."""
        return not self._missing()

    def prepare_data(self) -> None:
        """Download the files, unless all are there."""
        missing = self._missing()
        if not missing:
            return
        try:
            from torchvision import datasets
        except ImportError as error:
            raise self._not_found(
                missing, 'torchvision, which downloads, is absent: pip install "dfc_lightning[recipes]"'
            ) from error
        try:
            getattr(datasets, self.dataset)(self.root, download=True)
        except (RuntimeError, OSError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise self._not_found(missing, f"the download failed: {reason}") from error

    def setup(self, stage: str | None = None) -> None:
        """Read and preprocess what ``stage`` needs, once; every set if ``stage`` is None."""
        if stage in (None, "fit", "validate") and self.train_set is None:
            inputs, targets = self._read_split("train")
            train, val = random_split_indices(len(inputs), [self.validation_size], self.seed)
            self.train_set = self._training_pairs(self._preprocess(inputs[train]), targets[train])
            self.val_set = TensorPairs(self._preprocess(inputs[val]), targets[val])
        if stage in (None, "test") and self.test_set is None:
            inputs, targets = self._read_split("test")
            self.test_set = TensorPairs(self._preprocess(inputs), targets)

    def _training_pairs(self, inputs: Tensor, targets: Tensor) -> TensorPairs:
        return TensorPairs(inputs, targets)

    def _preprocess(self, images: Tensor) -> Tensor:
        """Turn bytes (N, C, H, W) into float32."""
        inputs = images.to(torch.float32).div_(255)
        if not self.standardize:
            return inputs
        mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (self.mean, self.std))
        return inputs.sub_(mean).div_(std)

    def _read_split(self, split: str) -> tuple[Tensor, Tensor]:
        missing = self._missing(split)
        if missing:
            raise self._not_found(missing, "nothing was downloaded, since prepare_data() has not run")
        paths = [self._path(name) for name in self.files[split]]
        images, labels = self._read(paths)
        self._check(images, labels, split, ", ".join(map(str, paths)))
        return images, labels.long()

    def _check(self, images: Tensor, labels: Tensor, split: str, files: str) -> None:
        """Refuse whole files of another thing, on which training would fail, or not fail."""
        if images.shape[1:] != self.image_shape or labels.ndim != 1:
            shapes = f"{tuple(images.shape)} and {tuple(labels.shape)}"
            raise DataError(
                f"{files}: images and labels have shapes {shapes}, not (N, {', '.join(map(str, self.image_shape))}) "
                f"and (N,), so these are not {self.dataset}'s. Replace them."
            )
        if len(images) != len(labels):
            raise DataError(f"{files}: {len(images)} images, but {len(labels)} labels. Replace them.")
        if labels.is_floating_point() or labels.min() < 0 or labels.max() >= self.classes:
            raise DataError(f"{files}: the labels are not whole numbers from 0 to {self.classes - 1}. Replace them.")
        if split == "train" and len(images) <= self.validation_size:
            raise DataError(
                f"{files}: {len(images)} images leave none for training after validation_size={self.validation_size}. "
                "Replace the files, or lower --data.init_args.validation_size."
            )

    def _read(self, paths: Sequence[Path]) -> tuple[Tensor, Tensor]:
        """Bytes (N, C, H, W) and labels (N,) from the files of a split."""
        raise NotImplementedError

    def _path(self, name: str) -> Path:
        return self.raw / name

    def _missing(self, *splits: str) -> list[str]:
        return [name for split in splits or self.files for name in self.files[split] if not self._path(name).exists()]

    def _not_found(self, missing: list[str], reason: str) -> FileNotFoundError:
        return FileNotFoundError(
            f"{self.dataset}: {', '.join(missing)} not found in {self.raw.absolute()}, "
            f"and {reason}. Put the files into <root>/{self.place}, or name the root that holds them by "
            "DFC_DATA_ROOT or --data.init_args.root, or connect to a network and run again to download them."
        )


class _IdxImages(Images):
    """What MNIST and Fashion-MNIST share: four files, 60,000 + 10,000 images of 28x28 pixels, ten classes."""

    files = {
        "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
        "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
    }
    image_shape = (1, 28, 28)
    training_images = 60_000

    def _read(self, paths: Sequence[Path]) -> tuple[Tensor, Tensor]:
        images, labels = (_read_idx(path) for path in paths)
        return images.unsqueeze(1), labels

    def _path(self, name: str) -> Path:
        plain = self.raw / name
        return plain if plain.exists() else self.raw / f"{name}.gz"


class MNIST(_IdxImages):
    """MNIST handwritten digits: 60,000 training and 10,000 test images in ten classes.

    A batch is an input of shape (B, 1, 28, 28), float32, and labels of shape (B,), int64. Files that are
    already there, plain or gzipped, are only read; otherwise torchvision downloads them.

    Args:
        root: Folder that holds ``MNIST/raw``. By default the environment variable ``DFC_DATA_ROOT``, or
            ``data``.
        batch_size: Samples in a training batch.
        validation_size: Training images held out for validation; 0 leaves no validation set.
        standardize: Whether to subtract 0.1307 from the pixels and divide them by 0.3081. Otherwise they lie
            in [0, 1].
        seed: Seed of the split, which is independent of PyTorch's global generator.
        eval_batch_size: Samples in a validation or test batch.
        num_workers: Processes that load batches; 0 loads in the main process.
        shuffle: Whether each training epoch visits the samples in a new order.
    """

    dataset, place = "MNIST", "MNIST/raw"
    mean, std = 0.1307, 0.3081

    def __init__(
        self,
        root: str | os.PathLike | None = None,
        batch_size: int = 128,
        validation_size: int = 5000,
        standardize: bool = True,
        seed: int = 0,
        eval_batch_size: int = 1000,
        num_workers: int = 0,
        shuffle: bool = True,
    ) -> None:
        super().__init__(root, batch_size, validation_size, standardize, seed, eval_batch_size, num_workers, shuffle)


class FashionMNIST(_IdxImages):
    """Fashion-MNIST pictures of clothing: 60,000 training and 10,000 test images in ten classes.

    A batch is an input of shape (B, 1, 28, 28), float32, and labels of shape (B,), int64. Files that are
    already there, plain or gzipped, are only read; otherwise torchvision downloads them.

    Args:
        root: Folder that holds ``FashionMNIST/raw``. By default the environment variable ``DFC_DATA_ROOT``,
            or ``data``.
        batch_size: Samples in a training batch.
        validation_size: Training images held out for validation; 0 leaves no validation set.
        standardize: Whether to subtract 0.2860 from the pixels and divide them by 0.3530. Otherwise they lie
            in [0, 1], as in the experiments of Meulemans et al. (2021).
        seed: Seed of the split, which is independent of PyTorch's global generator.
        eval_batch_size: Samples in a validation or test batch.
        num_workers: Processes that load batches; 0 loads in the main process.
        shuffle: Whether each training epoch visits the samples in a new order.
    """

    dataset, place = "FashionMNIST", "FashionMNIST/raw"
    mean, std = 0.2860, 0.3530

    def __init__(
        self,
        root: str | os.PathLike | None = None,
        batch_size: int = 128,
        validation_size: int = 5000,
        standardize: bool = False,
        seed: int = 0,
        eval_batch_size: int = 1000,
        num_workers: int = 0,
        shuffle: bool = True,
    ) -> None:
        super().__init__(root, batch_size, validation_size, standardize, seed, eval_batch_size, num_workers, shuffle)


def _read_idx(path: Path) -> Tensor:
    """Read an IDX file of bytes: 0, 0, 8, rank, then each size as a big-endian int32, then the values."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            content = bytearray(file.read())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged: it cannot be unpacked ({error}). Replace it.") from error
    rank = content[3] if content[:3] == b"\x00\x00\x08" else 0
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank)]
    start = 4 + 4 * rank
    if rank == 0 or math.prod(shape) == 0 or len(content) != start + math.prod(shape):
        raise DataError(f"{path} is damaged: not a complete IDX file of unsigned bytes. Replace it.")
    return torch.frombuffer(content, dtype=torch.uint8, offset=start).view(shape)
