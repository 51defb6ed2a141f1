"""Outputs wider than the layer before them: the steady state as a root in that layer's rates.

With Q_L = I and a linear output layer, δ_L = δr_L + α̃ u and δr_L = W_L z + u, z being δr_{L−1}, give the control as
u = (δ_L − W_L z) / (1 + α̃). What is left to solve is z = δr_{L−1}(u), of size n_{L−1} instead of n_L, and the products
with Q_i go through Q_i δ_L and Q_i W_L, formed once.
"""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor

from dfc_lightning.passes.closed_forms import hidden_gain
from dfc_lightning.passes.dense import DenseDeviation, DensePass
from dfc_lightning.passes.forward_pass import Deviation, ForwardPass
from dfc_lightning.settling.broyden import Root, StoredSteps, find_root
from dfc_lightning.settling.equation import Equation
from dfc_lightning.settling.inverse import DENSE_UP_TO


@singledispatch
def wide_root(forward: ForwardPass, equation: Equation, linear: bool = False) -> Root[Deviation] | None:
    """The root of ``equation`` by way of fewer unknowns than outputs, where one is known; else None.

    Args:
        forward: the equation's pass.
        equation: what is to be solved.
        linear: with the network linearised at the feedforward state (Lemma 1).
    """
    return None


@wide_root.register
def _(forward: DensePass, equation: Equation, linear: bool = False) -> Root[Deviation] | None:
    if forward.outputs <= DENSE_UP_TO or not forward.reducible:  # with feedback that is not Q_L = I it is not
        return None
    offset, shift, last, widths = equation.offset, 1 + equation.leakage, forward.weights[-1], forward.widths[:-1]
    feedback = forward.stacked_feedback[: sum(widths)]
    direct, back = offset @ feedback.T / shift, feedback @ last / shift
    gram = last.T @ last
    size = torch.linalg.vector_norm(offset, dim=1).clamp_min(torch.finfo(offset.dtype).tiny)

    def missing(z: Tensor) -> tuple[Tensor, DenseDeviation | None]:
        apical = (direct - z @ back.T).split(widths, dim=1)
        if linear:
            return forward.linear_response(apical) - z, None
        hidden = forward.respond(apical)
        return hidden.rates[-1] - z, hidden

    def measure(value: Tensor) -> Tensor:  # ‖W_L value‖, what the output misses
        return torch.linalg.vecdot(value @ gram, value).clamp_min(0).sqrt() / size

    # What z makes of itself by way of the feedback, with batch-mean slopes.
    gain = hidden_gain(forward.weights, [*back.split(widths), last], forward.mean_slopes)[0]
    gain.diagonal().add_(1)
    matrix = torch.linalg.inv_ex(gain)[0].T
    inverse = StoredSteps(lambda y: y @ matrix)
    at_zero = missing(torch.zeros_like(forward.v[-2]))[0]
    # A little closer than asked for: the outputs' residual is not this one to the last digit.
    accuracy = 0.9 * equation.accuracy
    root = find_root(missing, inverse.step(at_zero), inverse, at_zero, accuracy, equation.affordable, measure)
    equation.spend(2 + root.iterations)
    u = (offset - root.u @ last.T) / shift
    response: DenseDeviation | None = None
    if (hidden := root.aux) is not None:
        basal = hidden.rates[-1] @ last.T
        response = DenseDeviation([*hidden.basal, basal], [*hidden.driven, u], [*hidden.rates, basal + u])
    return Root(u, root.residual, root.converged, root.iterations, response)
