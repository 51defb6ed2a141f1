"""What feedback learning needs of a network: J_i and Q_i, of the layers of a chain or of the groups of a graph."""

from __future__ import annotations

from typing import TypeAlias

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


def jacobians_and_gains(layers: Layers, activity: AnyActivity) -> tuple[list[Tensor], Tensor]:
    """J_i, one (B, n_L, n_i) a layer, and G_i = J_i Q_i, (B, L, n_L, n_L)."""
    if isinstance(layers, Chain):
        assert isinstance(activity, Activity)
        jacobians = layers.jacobians(activity.slopes)
    else:
        jacobians = layers.jacobians(activity)
    # With the rows of Qᵀ in memory this is one product for the whole batch, and twice as fast.
    gains = [linear(j, q.T.contiguous()) for j, q in zip(jacobians, layers.feedback)]
    return jacobians, torch.stack(gains, dim=1)
