"""What feedback learning needs of a network: J_i and Q_i, of the layers of a chain or of the groups of a graph."""

from __future__ import annotations

from typing import TypeAlias, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from dfc_lightning.control.chain import Activity, Chain
from dfc_lightning.control.graph import Graph, GraphActivity, Layered

Layers: TypeAlias = Chain | Layered
AnyActivity: TypeAlias = Activity | GraphActivity


def outputs(network: Layers | Graph) -> int:
    """n_L."""
    return network.feedback[-1].shape[1]


def able_units(layers: Layers, activity: AnyActivity) -> list[Tensor]:
    """1 for units whose rate a push of their voltage can move, else 0: one (B, n_i) a layer."""
    slopes = layers.slopes(cast(GraphActivity, activity)) if isinstance(layers, Layered) else activity.slopes
    return [(d != 0).to(d) for d in slopes]


def gated_product(q: Tensor, squares: Tensor, able: Tensor) -> Tensor:
    """Σ_b m_b ⊙ (Q X_b) for a mask m_b of the rows of Q.

    Args:
        q: Q_i, (n_i, n_L).
        squares: X_b, (B, n_L, n_L).
        able: m_b, (B, n_i).
    """
    of_units = (able.T @ squares.flatten(1)).view(-1, *squares.shape[1:])
    return torch.einsum("rj,rjl->rl", q, of_units)


def jacobians_and_gains(layers: Layers, activity: AnyActivity) -> tuple[list[Tensor], Tensor]:
    """J_i, one (B, n_L, n_i) a layer, and G_i = J_i Q_i, (B, L, n_L, n_L)."""
    if isinstance(layers, Chain):
        assert isinstance(activity, Activity)
        jacobians = layers.jacobians(activity)
    else:
        jacobians = layers.jacobians(activity)
    # With the rows of Qᵀ in memory this is one product for the whole batch, and twice as fast.
    gains = [linear(j, q.T.contiguous()) for j, q in zip(jacobians, layers.feedback)]
    return jacobians, torch.stack(gains, dim=1)
