"""Where the samples of a batch lie in a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Which dimension the samples lie in, alone or folded with others: it is (before, B, rows), flattened.

    Tensors may hold several times the batch: then B is as many times larger.

    Args:
        dim: the dimension.
        before: how often the batch follows itself in it, as where time and batch are folded in that order.
        rows: how many rows in it a sample has, as where batch and time are folded in that order.
    """

    dim: int = 0
    before: int = 1
    rows: int = 1

    def first(self, value: Tensor) -> Tensor:
        """The samples in a dimension of their own, the first; what they were folded with comes next."""
        if self in (FIRST, SHARED):
            return value
        folds = [*[self.before][: self.before != 1], -1, *[self.rows][: self.rows != 1]]
        apart = value.unflatten(self.dim, folds) if len(folds) > 1 else value
        return apart.movedim(self.dim + (self.before != 1), 0)

    def back(self, value: Tensor) -> Tensor:
        """The inverse of :meth:`first`."""
        if self in (FIRST, SHARED):
            return value
        apart = value.movedim(0, self.dim + (self.before != 1))
        last = self.dim + (self.before != 1) + (self.rows != 1)
        return apart.flatten(self.dim, last) if last > self.dim else apart

    def sized(self, shape: Sequence[int], batch: int) -> tuple[int, ...]:
        """A shape for another number of samples."""
        if self == SHARED:
            return tuple(shape)
        return (*shape[: self.dim], self.before * batch * self.rows, *shape[self.dim + 1 :])

    def times(self, shape: Sequence[int], of: Sequence[int]) -> int:
        """How many times the batch ``shape`` has, where ``of`` has it once."""
        return shape[self.dim] // max(of[self.dim], 1)

    def samples(self, value: Tensor, index: Tensor) -> Tensor:
        """Some samples only."""
        if self == SHARED:
            return value
        return value[index] if self == FIRST else self.back(self.first(value)[index])

    def split(self, value: Tensor, batch: int) -> Sequence[Tensor]:
        """Several times the batch, taken apart."""
        if self.before == 1:
            return value.split(batch * self.rows, dim=self.dim)
        return [self.back(each) for each in self.first(value).split(batch)]

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`split`."""
        if self.before == 1:
            return torch.cat(list(parts), dim=self.dim)
        return self.back(torch.cat([self.first(each) for each in parts]))

    def weighed(self, error: Tensor, weight: Tensor) -> Tensor:
        """Errors, maybe of several times the batch, times a weight for each entry."""
        if error.shape == weight.shape:
            return error * weight
        if self.dim == 0 and self.before == 1:
            return (error.view(-1, *weight.shape) * weight).flatten(0, 1)
        weight = self.first(weight)
        return self.back((self.first(error).unflatten(0, (-1, len(weight))) * weight).flatten(0, 1))


FIRST = Layout()
SHARED = Layout(-1, 0, 0)
"""Of what is the same for all samples: what is made of parameters alone."""
