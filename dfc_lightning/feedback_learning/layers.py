"""A network of any shape as feedback learning sees it: J_i and Q_i of the layers of a chain."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from dfc_lightning.passes.forward_pass import ForwardPass

T = TypeVar("T")


class LayerGroups:
    """The points of a network, grouped by the somata between them and the output as if they were layers of a chain.

    To feedback learning a network is J_i and Q_i, and the number of somata that filter a layer's noise on its way to
    the output: on the longest way, where there are several. Each point of a chain is a group by itself, and its tensors
    are taken as they are.

    Args:
        forward: the feedforward pass.
    """

    def __init__(self, forward: ForwardPass) -> None:
        self.forward, somata = forward, forward.somata
        self.groups = [[i for i, n in enumerate(somata) if n == count] for count in range(max(somata), 0, -1)]

    @property
    def depth(self) -> int:
        """L, the number of groups."""
        return len(self.groups)

    @cached_property
    def widths(self) -> list[int]:
        """The number of units of each group."""
        return [sum(self.forward.widths[i] for i in group) for group in self.groups]

    @cached_property
    def feedback(self) -> list[Tensor]:
        """Q of each group, (n, n_L)."""
        return self.by_group(self.forward.feedback)

    @cached_property
    def able(self) -> list[Tensor]:
        """1 for units whose rate a push of their voltage can move, else 0: one (B, n) a group."""
        return self.by_group(self.forward.able, dim=1)

    def jacobians(self) -> list[Tensor]:
        """J of each group, (B, n_L, n)."""
        return self.by_group(self.forward.jacobians(), dim=2)

    def jacobians_and_gains(self) -> tuple[list[Tensor], Tensor]:
        """J_i, one (B, n_L, n) a group, and G_i = J_i Q_i, (B, L, n_L, n_L)."""
        jacobians = self.jacobians()
        # With the rows of Qᵀ in memory this is one product for the whole batch, and twice as fast.
        gains = [linear(j, q.T.contiguous()) for j, q in zip(jacobians, self.feedback)]
        return jacobians, torch.stack(gains, dim=1)

    def by_group(self, tensors: Sequence[Tensor], dim: int = 0) -> list[Tensor]:
        """What is for the points, units in dimension ``dim``, as it is for the groups."""
        return [
            torch.cat([tensors[i] for i in group], dim) if len(group) > 1 else tensors[group[0]]
            for group in self.groups
        ]

    def by_point(self, grouped: Sequence[Tensor]) -> list[Tensor]:
        """What is for the groups, units in the first dimension, as it is for the points."""
        found: dict[int, Tensor] = {}
        for group, tensor in zip(self.groups, grouped):
            widths = [self.forward.widths[i] for i in group]
            found |= zip(group, tensor.split(widths) if len(group) > 1 else [tensor])
        return [found[i] for i in range(len(found))]

    def of_points(self, grouped: Sequence[T]) -> list[T]:
        """What each point's group has, point by point."""
        found = {i: value for group, value in zip(self.groups, grouped) for i in group}
        return [found[i] for i in range(len(found))]


def gated_product(q: Tensor, squares: Tensor, able: Tensor) -> Tensor:
    """Σ_b m_b ⊙ (Q X_b) for a mask m_b of the rows of Q.

    Args:
        q: Q_i, (n_i, n_L).
        squares: X_b, (B, n_L, n_L).
        able: m_b, (B, n_i).
    """
    of_units = (able.T @ squares.flatten(1)).view(-1, *squares.shape[1:])
    return torch.einsum("rj,rjl->rl", q, of_units)


def side_by_side(blocks: Tensor) -> Tensor:
    """(B, n, m) as (n, B m): a product with rows stacked over the batch then sums over the batch."""
    return blocks.transpose(0, 1).reshape(blocks.shape[1], -1)
