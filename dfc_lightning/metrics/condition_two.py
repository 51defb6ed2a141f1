from __future__ import annotations

import torch
from torch import Tensor

from dfc_lightning.metrics.base import SampleMean


def condition_two(feedback: Tensor, jacobian: Tensor) -> Tensor:
    r"""How much of the feedback weights lies in the row space of the Jacobian: Condition 2 of Meulemans et al. 2021.

    .. math:: \frac{1}{B} \sum_b \frac{\lVert J^T (J J^T)^{-1} J Q \rVert_F}{\lVert Q \rVert_F}

    One where the columns of Q span the rows of J, and DFC's update is the minimum-norm one (Theorem 3).

    Args:
        feedback: all Q_i one above the other, (Σ n_i, n_L); of layered feedback those of each sample,
            (B, Σ n_i, n_L).
        jacobian: J = ∂r_L/∂[v_1 … v_L] of each sample, (B, n_L, Σ n_i), of full row rank.

    Example:
        >>> import torch
        >>> jacobian = torch.tensor([[[1.0, 1.0]], [[1.0, 0.0]]])
        >>> print(f"{condition_two(jacobian[0].T, jacobian[:1]):.4f}")
        1.0000
        >>> print(f"{condition_two(jacobian[0].T, jacobian):.4f}")
        0.8536
    """
    return _ratio(feedback, jacobian).mean()


class ConditionTwo(SampleMean):
    """Share of the feedback weights in the row space of J, a mean over samples; see :func:`condition_two`.

    Example:
        >>> import torch
        >>> metric = ConditionTwo()
        >>> metric.update(torch.tensor([[1.0], [1.0]]), torch.tensor([[[1.0, 1.0]]]))
        >>> metric.update(torch.tensor([[1.0], [1.0]]), torch.tensor([[[1.0, 0.0]]]))
        >>> metric.compute()
        tensor(0.8536, dtype=torch.float64)
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def update(self, feedback: Tensor, jacobian: Tensor) -> None:
        """Count a batch in: the stacked feedback weights, (Σ n_i, n_L) or (B, …), and J, (B, n_L, Σ n_i)."""
        self.add(_ratio(feedback, jacobian))


def _ratio(feedback: Tensor, jacobian: Tensor) -> Tensor:
    gram, gain = (jacobian @ jacobian.mT).double(), (jacobian @ feedback).double()
    # With JJᵀ = CCᵀ the projector is Jᵀ C⁻ᵀ C⁻¹ J, and Jᵀ C⁻ᵀ has orthonormal columns: the norm is that of C⁻¹ JQ.
    factor, _ = torch.linalg.cholesky_ex(gram)
    projected = torch.linalg.solve_triangular(factor, gain, upper=False)
    return torch.linalg.matrix_norm(projected) / torch.linalg.matrix_norm(feedback.double())
