"""Is the controlled network stable about its feedforward state? The matrices, and their rightmost eigenvalue.

To first order the network under control is dz/dt = A z + const with z = (Δv_1 … Δv_L, u), time in units of τ_u,
τ = τ_v/τ_u, Ĵ the matrix of W_i D_{i−1} below the diagonal, J_L° = [0 … 0, D_L], so that J = J_L° (I − Ĵ)⁻¹.
It is stable where all eigenvalues of A have negative real parts.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dfc_lightning.errors import require
from dfc_lightning.metrics.base import SampleMean
from dfc_lightning.passes.dense import as_dense
from dfc_lightning.passes.forward_pass import ForwardPass
from dfc_lightning.settling.controller import PIController

Reduction = Literal["mean", "max", "none"]


def instantaneous_matrix(feedback: Tensor, jacobian: Tensor, alpha: float) -> Tensor:
    """−(JQ + αI), (B, n_L, n_L): how u moves where the network follows at once (Condition 3, Meulemans et al. 2021).

    Args:
        feedback: all Q_i one above the other, (Σ n_i, n_L); of layered feedback those of each sample,
            (B, Σ n_i, n_L).
        jacobian: J of each sample, (B, n_L, Σ n_i).
        alpha: leakage of the controller; of a proportional-integral one, α̃ (``controller.steady_leakage``).
    """
    gain = (jacobian @ feedback).double()
    return -gain - alpha * torch.eye(gain.shape[-1], dtype=gain.dtype, device=gain.device)


def control_matrix(
    forward: ForwardPass,
    controller: PIController,
    tau_ratio: float,
    coordinates: Literal["voltages", "driven"] = "voltages",
) -> Tensor:
    r"""The full network-and-controller matrix A of each sample, (B, Σ n_i + n_L, Σ n_i + n_L).

    .. math:: A = \begin{pmatrix} -\frac{1}{\tau}(I - \hat J) & \frac{1}{\tau} Q \\
        -c J_L^\circ + \frac{k_p}{\tau} J_L^\circ (I - \hat J) & -\alpha I - \frac{k_p}{\tau} J_L^\circ Q \end{pmatrix}

    from du/dt = c e − αu + k_p de/dt, where c = 1 if the control leaks and 1 + α k_p if its integral does.

    Args:
        forward: the pass of a chain, bound to feedback weights; A is that of its feedforward state.
        controller: α, k_p and what leaks.
        tau_ratio: τ = τ_v / τ_u.
        coordinates: ``"voltages"``, z = (Δv, u), the paper's Ã; or ``"driven"``, z = ((I − Ĵ)Δv, u), what each layer's
            own input does not account for, its A. The eigenvalues are the same.

    Raises:
        ControlError: the network is no chain.
    """
    require(tau_ratio > 0, "tau_ratio", tau_ratio, "give a ratio of time constants above zero, e.g. 0.2")
    require(coordinates in ("voltages", "driven"), "coordinates", coordinates, 'choose "voltages" or "driven"')
    dense = as_dense(
        forward,
        "The matrix of network and controller",
        "instantaneous_matrix(...) tells whether a slow controller is stable.",
    )
    slopes = [d.double() for d in dense.slopes]
    q, sizes, outputs = dense.joint_feedback().double(), dense.widths, dense.outputs
    units, batch = sum(sizes), slopes[0].shape[0]
    identity = torch.eye(units + outputs, dtype=q.dtype, device=q.device)
    still = identity[:units, :units].repeat(batch, 1, 1)  # I − Ĵ
    start = 0
    for w, d, n, m in zip(dense.weights[1:], slopes, sizes[1:], sizes):
        still[:, start + m : start + m + n, start : start + m] -= w.double() * d.unsqueeze(1)
        start += m
    output = torch.zeros(batch, outputs, units, dtype=q.dtype, device=q.device)  # J_L°
    output[:, :, -outputs:] = torch.diag_embed(slopes[-1])
    alpha, gain = controller.alpha, controller.k_p / tau_ratio
    push = 1.0 if controller.leak == "control" else 1 + alpha * controller.k_p
    a = -alpha * identity.repeat(batch, 1, 1)
    a[:, :units, :units] = -still / tau_ratio
    a[:, units:, units:] -= gain * output @ q
    if coordinates == "voltages":
        a[:, :units, units:] = q / tau_ratio
        a[:, units:, :units] = gain * output @ still - push * output
    else:
        a[:, :units, units:] = still @ q / tau_ratio
        a[:, units:, :units] = gain * output - push * torch.linalg.solve_triangular(
            still, output, upper=False, left=False
        )
    return a


def stability_eigenvalue(matrix: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Largest real part of the eigenvalues, max Re λ(A); below zero where the system is stable.

    Args:
        matrix: A of each sample, (B, n, n), from :func:`instantaneous_matrix` or :func:`control_matrix`.
        reduction: over samples: ``"mean"`` (as in the paper's figures), ``"max"`` (the least stable) or ``"none"``.

    Example:
        >>> import torch
        >>> jacobian, feedback = torch.tensor([[[1.0, 2.0]], [[0.0, 1.0]]]), torch.tensor([[1.0], [2.0]])
        >>> stability_eigenvalue(instantaneous_matrix(feedback, jacobian, alpha=0.5))
        tensor(-4., dtype=torch.float64)
        >>> stability_eigenvalue(instantaneous_matrix(feedback, jacobian, alpha=0.5), reduction="max")
        tensor(-2.5000, dtype=torch.float64)
    """
    require(reduction in ("mean", "max", "none"), "reduction", reduction, 'choose "mean", "max" or "none"')
    values = eigenvalues(matrix.double()).real.amax(1)
    return values if reduction == "none" else getattr(values, reduction)()


def eigenvalues(matrix: Tensor) -> Tensor:
    """Eigenvalues of each matrix, (B, n); NaN where an entry is NaN or infinite, which LAPACK would raise on."""
    finite = torch.isfinite(matrix).all(2).all(1)
    values = torch.linalg.eigvals(torch.where(finite.view(-1, 1, 1), matrix, 0.0))
    return torch.where(finite.unsqueeze(1), values, torch.nan)


class StabilityEigenvalue(SampleMean):
    """Largest real part of the eigenvalues, a mean over samples; see :func:`stability_eigenvalue`.

    Example:
        >>> import torch
        >>> metric = StabilityEigenvalue()
        >>> metric.update(torch.tensor([[[-1.0, 5.0], [0.0, -2.0]]]))
        >>> metric.update(torch.tensor([[[-3.0, 5.0], [0.0, -2.0]]]))
        >>> metric.compute()
        tensor(-1.5000, dtype=torch.float64)
    """

    higher_is_better = False

    def update(self, matrix: Tensor) -> None:
        """Count a batch in: A of each sample, (B, n, n)."""
        self.add(stability_eigenvalue(matrix, "none"))
