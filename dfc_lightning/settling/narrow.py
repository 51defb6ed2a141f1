"""Outputs wider than the layer before them: the steady state as a root in that layer's rates.

With Q_L = I and a linear output layer, δ_L = δr_L + α̃ u and δr_L = W_L z + u, z being δr_{L−1}, give the control as
u = (δ_L − W_L z) / (1 + α̃). What is left to solve is z = δr_{L−1}(u), of size n_{L−1} instead of n_L, and the products
with Q_i go through Q_i δ_L and Q_i W_L, formed once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dfc_lightning.control.chain import Activity, Chain, Response
from dfc_lightning.settling.root import Root, StoredSteps, find_root


def narrow_root(
    chain: Chain,
    activity: Activity,
    offset: Tensor,
    leakage: float,
    accuracy: float,
    max_iterations: int,
    linear: bool = False,
) -> tuple[Root, Response | None]:
    """The settled control of a chain that is ``reducible``, as :func:`find_root` gives it.

    With it comes the network's response, unless another pass is needed for it.

    Args:
        chain: the controlled chain.
        activity: its feedforward activity.
        offset: δ_L, (B, n_L).
        leakage: α̃.
        accuracy: ‖δ_L − δr_L − α̃ u‖ / ‖δ_L‖ to reach.
        max_iterations: limit on Broyden's iterations.
        linear: with the network linearised at the feedforward state (Lemma 1).
    """
    shift, last, widths = 1 + leakage, chain.weights[-1], chain.widths[:-1]
    feedback = chain.stacked_feedback[: sum(widths)]
    direct, back = offset @ feedback.T / shift, feedback @ last / shift
    gram = last.T @ last
    size = torch.linalg.vector_norm(offset, dim=1).clamp_min(torch.finfo(offset.dtype).tiny)

    latest: list[tuple[Tensor, Response]] = []

    def missing(z: Tensor) -> Tensor:
        apical = (direct - z @ back.T).split(widths, dim=1)
        if linear:
            return chain.linear_response(activity.slopes, apical) - z
        response = chain.respond(activity, apical)
        latest[:] = [(z, response)]
        return response.rates[-1] - z

    def measure(value: Tensor) -> Tensor:  # ‖W_L value‖, what the output misses
        return torch.linalg.vecdot(value @ gram, value).clamp_min(0).sqrt() / size

    # What z makes of itself by way of the feedback, with batch-mean slopes.
    loop = Chain(chain.weights, chain.biases, chain.nonlinearities, [*back.split(widths), last])
    gain = loop.hidden_gain([d.mean(0, keepdim=True) for d in activity.slopes])[0]
    gain.diagonal().add_(1)
    matrix = torch.linalg.inv_ex(gain)[0].T
    inverse = StoredSteps(lambda y: y @ matrix)
    at_zero = missing(torch.zeros_like(activity.v[-2]))
    # A little closer than asked for: the outputs' residual is not this one to the last digit.
    root = find_root(missing, inverse.step(at_zero), inverse, at_zero, 0.9 * accuracy, max_iterations, measure)
    u = (offset - root.u @ last.T) / shift
    response = None
    if latest and torch.equal(latest[0][0], root.u):
        hidden = latest[0][1]
        basal = hidden.rates[-1] @ last.T
        response = Response([*hidden.basal, basal], [*hidden.driven, u], [*hidden.rates, basal + u])
    return root._replace(u=u), response
