"""What the training data are: whether they can be drawn once more, and whether a batch has samples."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset

_DEPTH, _FEW = 5, 16  # how far to look into a loader's parts, and in collections of how many


def can_be_read_again(loader: Any) -> bool:
    """Whether a second pass over ``loader`` leaves the first one all its batches; told without drawing any.

    It can where samples are had by an index, and where batches are in a collection that holds no iterator, file or
    queue. Streams are never taken to be: most can be started anew, but nothing tells those that cannot.
    """
    if isinstance(loader, Iterator):
        return False
    if isinstance(loader, DataLoader):
        return _indexed(loader)
    return hasattr(loader, "__len__") and not _used_up(loader, _DEPTH)


def is_empty(batch: Any) -> bool:
    """Whether a batch has tensors, and none of them a sample."""
    sizes = [len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    return len(sizes) > 0 and not any(sizes)


def _indexed(loader: DataLoader) -> bool:
    if isinstance(loader.dataset, IterableDataset):
        return False
    own = {name: part for name, part in vars(loader).items() if not name.startswith("_")}
    return not any(_used_up(part, _DEPTH) for part in own.values())


def _used_up(part: Any, depth: int) -> bool:
    """Whether reading ``part``, or something it holds, takes from it what is read."""
    if isinstance(part, io.IOBase):
        return True
    if isinstance(part, Iterator) or (hasattr(part, "get") and hasattr(part, "put")):
        return True
    if isinstance(part, DataLoader):
        return not _indexed(part)
    if depth == 0 or isinstance(part, (str, bytes, Tensor, np.ndarray, nn.Module, type)):
        return False
    within: list[Any] = []
    if isinstance(part, (Sequence, Mapping)):
        if isinstance(part, (list, tuple, dict)) and len(part) <= _FEW:
            within += part.values() if isinstance(part, dict) else part
    elif not (hasattr(part, "__iter__") or hasattr(part, "__getitem__")):
        return False
    held = getattr(part, "__dict__", {}).values()
    if hasattr(part, "__getitem__"):  # a file behind an index is read at any place
        held = [value for value in held if not isinstance(value, io.IOBase)]
    return any(_used_up(value, depth - 1) for value in [*within, *held])
