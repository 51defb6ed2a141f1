"""First guesses of (JQ + α̃ I)⁻¹: each sample's own, that to first order, or one for the whole batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dfc_lightning.control.chain import Activity, Chain
from dfc_lightning.control.evaluator import Evaluator, ForwardPass
from dfc_lightning.settling.root import DenseInverse, Inverse, StoredSteps

OWN_UP_TO = 6
"""Widest output for which a solve begins with each sample's own matrix.

Its n_L columns ride through the network with the batch: from here on a few more iterations from a cheaper matrix
cost less."""

DENSE_UP_TO = 64
"""Widest output for which an n_L × n_L matrix is held for each sample.

Beyond it the matrices outweigh the network, and batched LU of matrices wider than 128 has been seen to return wrong
results on multi-threaded CPUs."""


def own_inverse(chain: Evaluator, activity: ForwardPass, leakage: float) -> DenseInverse:
    """(JQ + α̃ I)⁻¹ of each sample at the feedforward state. A singular matrix gives infinities, not an exception."""
    return DenseInverse(_inverted(chain.output_gain(activity), leakage))


def cheap_inverse(chain: Evaluator, activity: ForwardPass, leakage: float) -> Inverse:
    """Much the same for less: to first order in the slopes' deviations from their batch mean, or with that mean alone.

    The first order is for chains where it costs no more than two passes. It saves two or three of Broyden's iterations
    where targets are near; far ones are reached no sooner.
    """
    if activity.output.shape[1] <= DENSE_UP_TO:
        if isinstance(chain, Chain) and isinstance(activity, Activity):
            passing = sum(w.numel() for w in chain.weights[1:]) + chain.stacked_feedback.numel()
            if sum(chain.widths) * chain.widths[-1] ** 2 <= 2 * passing:
                return DenseInverse(_inverted(_first_order_gain(chain, activity), leakage))
        return DenseInverse(_inverted(chain.mean_gain(activity), leakage))
    if isinstance(chain, Chain) and isinstance(activity, Activity) and chain.reducible:
        slopes = [d.mean(0, keepdim=True) for d in activity.slopes]
        return StoredSteps(_low_rank_solve(chain, slopes, 1 + leakage))
    gain = chain.mean_gain(activity)[0]
    gain.diagonal().add_(leakage)
    factors, pivots, _ = torch.linalg.lu_factor_ex(gain)
    return StoredSteps(lambda y: torch.linalg.lu_solve(factors, pivots, y.T).T)


def _first_order_gain(chain: Chain, activity: Activity) -> Tensor:
    """JQ, (B, n_L, n_L), by its derivatives with respect to each unit's slope at the batch mean.

    A slope's derivative is the outer product of what its rate does to the output and of what the control does to its
    voltage, so that all samples' gains are one product a layer, with a matrix of n_i × n_L² entries.
    """
    slopes = activity.slopes
    means = [d.mean(0, keepdim=True) for d in slopes]
    to_output = [j[0] @ w for j, w in zip(chain.jacobians(means)[1:], chain.weights[1:])]
    to_output.append(torch.eye(chain.widths[-1]).to(slopes[-1]))
    driven = chain.feedback[0]  # K_i of ``output_gain``, (n_i, n_L)
    gain = torch.zeros(1, driven.shape[1] ** 2).to(driven)
    for i, (a, d, mean) in enumerate(zip(to_output, slopes, means)):
        if i:
            driven = torch.addmm(chain.feedback[i], chain.weights[i] * means[i - 1], driven)
        derivatives = a.T.unsqueeze(2) * driven.unsqueeze(1)
        gain = torch.addmm(gain, d - mean, derivatives.flatten(1))
    return gain.unflatten(1, driven.shape[1:] * 2) + means[-1].T * driven


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
