"""Data that fits in memory: one tensor of inputs, one of targets, fetched a whole batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from dfc_lightning.data.checks import require_finite


class TensorPairs(Dataset):
    """Inputs and targets held in memory, indexed one sample or one whole batch at a time.

    Args:
        inputs: Shape (N, ...).
        targets: Shape (N, ...).

    Raises:
        DataError: inputs or targets hold NaN or infinity.

    Example:
        >>> pairs = TensorPairs(torch.zeros(10, 3), torch.arange(10))
        >>> loader = DataLoader(pairs, batch_size=4, collate_fn=pairs.collate)
        >>> [tuple(x.shape) for x, y in loader]
        [(4, 3), (4, 3), (2, 3)]
    """

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        if len(inputs) != len(targets):
            raise ValueError(f"inputs and targets differ in length: {len(inputs)} and {len(targets)}.")
        require_finite(inputs, "inputs")
        require_finite(targets, "targets")
        self.inputs = inputs
        self.targets = targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Fetch the batch of ``indices`` by one index operation per tensor."""
        picked = torch.as_tensor(indices)
        return self.inputs[picked], self.targets[picked]

    @staticmethod
    def collate(batch: Any) -> Any:
        """Leave a batch from ``__getitems__`` as it is; stack a list of single samples."""
        return default_collate(batch) if isinstance(batch, list) else batch


class TensorDataModule(L.LightningDataModule):
    """Serves three :class:`TensorPairs`, which a subclass's ``setup`` assigns.

    Args:
        batch_size: Samples in a training batch. The last batch of an epoch may be smaller.
        eval_batch_size: Samples in a validation or test batch.
        num_workers: Processes that load batches; 0 loads in the main process, which is fastest for data in
            memory.
        shuffle: Whether each training epoch visits the samples in a new order, drawn from PyTorch's global
            generator.
    """

    train_set: TensorPairs | None = None
    val_set: TensorPairs | None = None
    test_set: TensorPairs | None = None

    def __init__(
        self, batch_size: int, eval_batch_size: int = 1000, num_workers: int = 0, shuffle: bool = True
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.shuffle = shuffle

    def train_dataloader(self) -> DataLoader:
        """Batches of the training set, shuffled if ``shuffle``."""
        return self._loader(self.train_set, self.batch_size, self.shuffle)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Batches of the validation set in fixed order; no loader at all if that set is empty."""
        if self.val_set is not None and len(self.val_set) == 0:
            return []
        return self._loader(self.val_set, self.eval_batch_size, shuffle=False)

    def test_dataloader(self) -> DataLoader:
        """Batches of the test set in fixed order."""
        return self._loader(self.test_set, self.eval_batch_size, shuffle=False)

    def _loader(self, pairs: TensorPairs | None, batch_size: int, shuffle: bool) -> DataLoader:
        if pairs is None:
            raise RuntimeError(
                f"{type(self).__name__} holds no data for this loader yet. Call setup() with the matching stage first."
            )
        return DataLoader(
            pairs,
            batch_size=batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=pairs.collate,
        )


def random_split_indices(total: int, held_out: Sequence[int], seed: int) -> list[Tensor]:
    """Split ``range(total)`` at random, by a generator of its own.

    Args:
        total: Number of samples.
        held_out: Sizes of the held-out parts; the first part returned has what they leave.
        seed: Seed of the generator. PyTorch's global generator is neither read nor advanced.

    Returns:
        1 + len(held_out) disjoint int64 index tensors.

    Example:
        >>> [len(part) for part in random_split_indices(10, [3, 1], seed=0)]
        [6, 3, 1]
    """
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return list(order.split([total - sum(held_out), *held_out]))
