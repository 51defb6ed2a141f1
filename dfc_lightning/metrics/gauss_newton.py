from __future__ import annotations

import torch
from torch import Tensor

from dfc_lightning.control.chain import Activity, Chain
from dfc_lightning.control.checks import require
from dfc_lightning.rules.rule import Update


def gauss_newton_update(chain: Chain, activity: Activity, loss_grad: Tensor, damping: float = 0.0) -> Update:
    r"""The mean over samples of the damped Gauss-Newton step of the weights and biases for each sample alone.

    .. math:: \frac{1}{B} \sum_b J_W^T (J_W J_W^T + \gamma I)^{-1} \frac{\partial \ell_b}{\partial r_L}

    with J_W the Jacobian of the sample's output to all weights and biases. This is what DFC approximates where
    Conditions 1 and 2 hold (Meulemans et al. 2021, Theorem 2). The minimum-norm update of the voltages is the rule
    :class:`dfc_lightning.MinimumNorm`.

    J_W is never formed: the columns of W_i give J_W J_Wᵀ = Σ_i (‖r_{i−1}‖² + 1) J_i J_iᵀ, the 1 being the bias's.

    Args:
        chain: the network; its feedback weights are not looked at.
        activity: the feedforward pass of the batch.
        loss_grad: ∂ℓ_b/∂r_L of each sample's own loss, (B, n_L).
        damping: γ ≥ 0.

    Returns:
        The update with the sign of a gradient.

    Example:
        >>> import torch
        >>> from dfc_lightning.control.nonlinearity import Identity
        >>> one = torch.eye(1)
        >>> chain = Chain([2 * one], [None], [Identity()], [one])
        >>> gauss_newton_update(chain, chain.feedforward(4 * one), torch.tensor([[8.0]])).weights
        [tensor([[2.]])]
    """
    require(damping >= 0, "damping", damping, "give a damping of zero or more")
    inputs = activity.presynaptic()
    jacobians = chain.jacobians(activity)
    gram = loss_grad.new_zeros(1)
    for j, r, bias in zip(jacobians, inputs, chain.biases):
        weight = r.square().sum(1) + (0.0 if bias is None else 1.0)
        gram = gram + (j @ j.mT) * weight.view(-1, 1, 1)
    gram.diagonal(dim1=1, dim2=2).add_(damping)
    factor, _ = torch.linalg.cholesky_ex(gram)
    solved = torch.cholesky_solve(loss_grad.unsqueeze(2), factor)
    signals = [(j.mT @ solved).squeeze(2) for j in jacobians]
    return Update(chain.update(activity, signals, inputs, 1 / activity.batch_size))
