"""First guesses of (JQ + α̃ I)⁻¹: each sample's own, that to first order, one for the batch, or its size alone."""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor

from dfc_lightning.passes.closed_forms import jacobians
from dfc_lightning.passes.dense import DensePass
from dfc_lightning.passes.forward_pass import ForwardPass
from dfc_lightning.settling.broyden import DenseInverse, Inverse, StoredSteps

OWN_UP_TO = 6
"""Widest output for which a solve begins with each sample's own matrix.

Its n_L columns ride through the network with the batch: from here on a few more iterations from a cheaper matrix
cost less."""

DENSE_UP_TO = 64
"""Widest output for which an n_L × n_L matrix is held for each sample.

Beyond it the matrices outweigh the network, and batched LU of matrices wider than 128 has been seen to return wrong
results on multi-threaded CPUs."""


def own_inverse(forward: ForwardPass, leakage: float) -> DenseInverse:
    """(JQ + α̃ I)⁻¹ of each sample at the feedforward state. A singular matrix gives infinities, not an exception."""
    return DenseInverse(_inverted(forward.gain(), leakage))


def cheap_inverse(forward: ForwardPass, leakage: float) -> Inverse:
    """Much the same for less, by :func:`cheap_gain`; for outputs beyond ``DENSE_UP_TO`` by the mean gain's factors.

    Of layered feedback, whose JQ is costly to form, a JQ of size 1: that of a pass in its own unit.
    """
    if forward.layered:
        share = 1 / (1 + leakage)
        return StoredSteps(lambda y: y * share)
    if forward.outputs <= DENSE_UP_TO:
        return DenseInverse(_inverted(cheap_gain(forward), leakage))
    gain = forward.mean_gain()[0]
    if forward.unit is not None:
        gain = gain / forward.unit.size.mean()
    gain.diagonal().add_(leakage)
    factors, pivots, _ = torch.linalg.lu_factor_ex(gain)
    return StoredSteps(lambda y: torch.linalg.lu_solve(factors, pivots, y.T).T)


def first_inverse(forward: ForwardPass, leakage: float) -> Inverse:
    """Where to begin: each sample's own up to ``OWN_UP_TO`` outputs, a cheap one beyond."""
    return own_inverse(forward, leakage) if forward.outputs <= OWN_UP_TO else cheap_inverse(forward, leakage)


def cheap_gain(forward: ForwardPass) -> Tensor:
    """JQ approximately, (B, n_L, n_L), or (1, n_L, n_L) for all samples alike."""
    gain = batch_gain(forward)
    return gain if forward.unit is None else gain / forward.unit.size.unsqueeze(2)


@singledispatch
def batch_gain(forward: ForwardPass) -> Tensor:
    """JQ by what the batch has in common: its mean."""
    return forward.mean_gain()


@batch_gain.register
def _(forward: DensePass) -> Tensor:
    """To first order in the slopes' deviations from their batch mean, where that costs no more than two passes.

    It saves two or three of Broyden's iterations where targets are near; far ones are reached no sooner.
    """
    passing = sum(w.numel() for w in forward.weights[1:]) + forward.stacked_feedback.numel()
    pays = sum(forward.widths) * forward.outputs**2 <= 2 * passing
    return first_order_gain(forward) if pays else forward.mean_gain()


def first_order_gain(forward: DensePass) -> Tensor:
    """JQ, (B, n_L, n_L), by its derivatives with respect to each unit's slope at the batch mean.

    A slope's derivative is the outer product of what its rate does to the output and of what the control does to its
    voltage, so that all samples' gains are one product a layer, with a matrix of n_i × n_L² entries.
    """
    weights, feedback, slopes, means = forward.weights, forward.feedback, forward.slopes, forward.mean_slopes
    to_output = [j[0] @ w for j, w in zip(jacobians(weights, means)[1:], weights[1:])]
    to_output.append(torch.eye(forward.outputs).to(slopes[-1]))
    driven = feedback[0]  # K_i of :func:`.columns`, (n_i, n_L)
    gain = torch.zeros(1, driven.shape[1] ** 2).to(driven)
    for i, (a, d, mean) in enumerate(zip(to_output, slopes, means)):
        if i:
            driven = torch.addmm(feedback[i], weights[i] * means[i - 1], driven)
        derivatives = a.T.unsqueeze(2) * driven.unsqueeze(1)
        gain = torch.addmm(gain, d - mean, derivatives.flatten(1))
    return gain.unflatten(1, driven.shape[1:] * 2) + means[-1].T * driven


def _inverted(gain: Tensor, leakage: float) -> Tensor:
    gain.diagonal(dim1=1, dim2=2).add_(leakage)
    return torch.linalg.inv_ex(gain)[0]
