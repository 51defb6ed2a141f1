from __future__ import annotations

import torch
from torch import Tensor

from dfc_lightning.errors import require
from dfc_lightning.network.learning_rule import Update
from dfc_lightning.passes.dense import as_dense
from dfc_lightning.passes.forward_pass import ForwardPass
from dfc_lightning.passes.gram import gram_factor


def gauss_newton_update(forward: ForwardPass, loss_grad: Tensor, damping: float = 0.0) -> Update:
    r"""The mean over samples of the damped Gauss-Newton step of the weights and biases for each sample alone.

    .. math:: \frac{1}{B} \sum_b J_W^T (J_W J_W^T + \gamma I)^{-1} \frac{\partial \ell_b}{\partial r_L}

    with J_W the Jacobian of the sample's output to all weights and biases. This is what DFC approximates where
    Conditions 1 and 2 hold (Meulemans et al. 2021, Theorem 2). The minimum-norm update of the voltages is the rule
    :class:`dfc_lightning.MinimumNorm`.

    J_W is never formed: the columns of W_i give J_W J_Wᵀ = Σ_i (‖r_{i−1}‖² + 1) J_i J_iᵀ, the 1 being the bias's.

    Args:
        forward: the pass of a chain; its feedback weights are not looked at.
        loss_grad: ∂ℓ_b/∂r_L of each sample's own loss, (B, n_L).
        damping: γ ≥ 0.

    Returns:
        The update with the sign of a gradient.

    Raises:
        ControlError: the network is no chain.

    Example:
        >>> import torch
        >>> from dfc_lightning.operations.nonlinearity import Identity
        >>> from dfc_lightning.passes import DensePass, Layers
        >>> one = torch.eye(1)
        >>> forward = DensePass.run(4 * one, Layers([2 * one], [None], [Identity()]))
        >>> gauss_newton_update(forward, torch.tensor([[8.0]])).weights
        [tensor([[2.]])]
    """
    require(damping >= 0, "damping", damping, "give a damping of zero or more")
    dense = as_dense(forward, "The Gauss-Newton update", "Take the minimum-norm update, MinimumNorm(), instead.")
    jacobians = dense.jacobians()
    weights = [r.square().sum(1) + float(bias is not None) for r, bias in zip(dense.presynaptic, dense.biases)]
    factor = gram_factor(jacobians, damping, weights)
    solved = torch.cholesky_solve(loss_grad.unsqueeze(2), factor)
    return Update(dense.gradients([(j.mT @ solved).squeeze(2) for j in jacobians]))
