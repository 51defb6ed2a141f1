"""MNIST and Fashion-MNIST, read straight from their IDX files, plain or gzipped."""

from __future__ import annotations

import gzip
import math
import os
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from dfc_lightning.data.tensors import TensorDataModule, TensorPairs, random_split_indices

_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_TRAINING_IMAGES = 60_000


class _IdxImages(TensorDataModule):
    """What MNIST and Fashion-MNIST share: four files, 60,000 + 10,000 images of 28x28 pixels, ten classes."""

    folder: ClassVar[str]
    mean: ClassVar[float]
    std: ClassVar[float]

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
        if not 0 <= validation_size < _TRAINING_IMAGES:
            raise ValueError(
                f"validation_size={validation_size} must lie between 0 and {_TRAINING_IMAGES - 1}: "
                "it is taken from the training images."
            )
        self.root = Path(root or os.environ.get("DFC_DATA_ROOT") or "data").expanduser()
        self.validation_size = validation_size
        self.standardize = standardize
        self.seed = seed

    @property
    def raw(self) -> Path:
        """The folder of the four files."""
        return self.root / self.folder / "raw"

    def prepare_data(self) -> None:
        """Download the files, unless all four are there, plain or gzipped."""
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
            getattr(datasets, self.folder)(self.root, download=True)
        except (RuntimeError, OSError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise self._not_found(missing, f"the download failed: {reason}") from error

    def setup(self, stage: str | None = None) -> None:
        """Read and preprocess what ``stage`` needs, once; every set if ``stage`` is None."""
        if stage in (None, "fit", "validate") and self.train_set is None:
            inputs, targets = self._read("train")
            self.train_set, self.val_set = (
                TensorPairs(self._preprocess(inputs[part]), targets[part])
                for part in random_split_indices(len(inputs), [self.validation_size], self.seed)
            )
        if stage in (None, "test") and self.test_set is None:
            inputs, targets = self._read("test")
            self.test_set = TensorPairs(self._preprocess(inputs), targets)

    def _preprocess(self, images: Tensor) -> Tensor:
        """Turn bytes (N, 28, 28) into float32 (N, 1, 28, 28)."""
        inputs = images.unsqueeze(1).to(torch.float32).div_(255)
        return inputs.sub_(self.mean).div_(self.std) if self.standardize else inputs

    def _read(self, split: str) -> tuple[Tensor, Tensor]:
        missing = self._missing(split)
        if missing:
            raise self._not_found(missing, "nothing was downloaded, since prepare_data() has not run")
        images, labels = (_read_idx(self._path(name)) for name in _FILES[split])
        return images, labels.long()

    def _path(self, name: str) -> Path:
        plain = self.raw / name
        return plain if plain.exists() else self.raw / f"{name}.gz"

    def _missing(self, *splits: str) -> list[str]:
        return [name for split in splits or _FILES for name in _FILES[split] if not self._path(name).exists()]

    def _not_found(self, missing: list[str], reason: str) -> FileNotFoundError:
        return FileNotFoundError(
            f"{self.folder}: {', '.join(missing)} not found in {self.raw.absolute()} (plain or .gz), "
            f"and {reason}. Put the files into <root>/{self.folder}/raw, or name the root that holds them by "
            "DFC_DATA_ROOT or --data.init_args.root, or connect to a network and run again to download them."
        )


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

    folder = "MNIST"
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

    folder = "FashionMNIST"
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
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        content = bytearray(file.read())
    rank = content[3] if content[:3] == b"\x00\x00\x08" else 0
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank)]
    start = 4 + 4 * rank
    if rank == 0 or len(content) != start + math.prod(shape):
        raise ValueError(f"{path} is damaged: not a complete IDX file of unsigned bytes. Replace it.")
    return torch.frombuffer(content, dtype=torch.uint8, offset=start).view(shape)
