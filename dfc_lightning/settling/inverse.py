"""First guesses of (JQ + α̃ I)⁻¹: each sample's own, or one for the whole batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dfc_lightning.control.chain import Activity, Chain
from dfc_lightning.control.evaluator import Evaluator, ForwardPass
from dfc_lightning.settling.root import DenseInverse, Inverse, StoredSteps

OWN_UP_TO = 6
"""Widest output for which a solve begins with each sample's own matrix.

Its n_L columns ride through the network with the batch: from here on a few more iterations from the batch-mean
matrix cost less."""

DENSE_UP_TO = 64
"""Widest output for which an n_L × n_L matrix is held for each sample.

Beyond it the matrices outweigh the network, and batched LU of matrices wider than 128 has been seen to return wrong
results on multi-threaded CPUs."""


def own_inverse(chain: Evaluator, activity: ForwardPass, leakage: float) -> DenseInverse:
    """(JQ + α̃ I)⁻¹ of each sample at the feedforward state. A singular matrix gives infinities, not an exception."""
    return DenseInverse(_inverted(chain.output_gain(activity), leakage))


def mean_field_inverse(chain: Evaluator, activity: ForwardPass, leakage: float) -> Inverse:
    """The same with batch-mean slopes: one matrix for all samples, almost free."""
    if activity.output.shape[1] <= DENSE_UP_TO:
        return DenseInverse(_inverted(chain.mean_gain(activity), leakage))
    if isinstance(chain, Chain) and isinstance(activity, Activity) and chain.reducible:
        slopes = [d.mean(0, keepdim=True) for d in activity.slopes]
        return StoredSteps(_low_rank_solve(chain, slopes, 1 + leakage))
    gain = chain.mean_gain(activity)[0]
    gain.diagonal().add_(leakage)
    factors, pivots, _ = torch.linalg.lu_factor_ex(gain)
    return StoredSteps(lambda y: torch.linalg.lu_solve(factors, pivots, y.T).T)


def _low_rank_solve(chain: Chain, slopes: list[Tensor], shift: float) -> Callable[[Tensor], Tensor]:
    """With Q_L = I and a linear output, JQ + α̃ I = c I + W_L N with c = 1 + α̃: Woodbury, of size n_{L−1}."""
    hidden = chain.hidden_gain(slopes)[0]
    inner = hidden @ chain.weights[-1]
    inner.diagonal().add_(shift)
    back = chain.weights[-1] @ torch.linalg.inv_ex(inner)[0]
    return lambda y: (y - (y @ hidden.T) @ back.T) / shift


def _inverted(gain: Tensor, leakage: float) -> Tensor:
    gain.diagonal(dim1=1, dim2=2).add_(leakage)
    return torch.linalg.inv_ex(gain)[0]
