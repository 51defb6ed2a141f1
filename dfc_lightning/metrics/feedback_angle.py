from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from dfc_lightning.errors import require
from dfc_lightning.metrics.base import SampleMean

FeedbackTarget = Literal["transpose", "pseudoinverse"]


def feedback_angle(
    feedback: Tensor, jacobian: Tensor, target: FeedbackTarget = "pseudoinverse", damping: float = 0.0
) -> Tensor:
    r"""Angle of the feedback weights to the Jacobian's transpose or damped pseudoinverse, a mean over samples.

    .. math:: \frac{1}{B} \sum_b \angle(Q, J^T) \quad\text{or}\quad
        \frac{1}{B} \sum_b \angle\bigl(Q, J^T (J J^T + \gamma I)^{-1}\bigr)

    Feedback learning aligns Q with the latter (Meulemans et al. 2021, Theorem 6).

    Args:
        feedback: all Q_i one above the other, (Σ n_i, n_L); of layered feedback those of each sample,
            (B, Σ n_i, n_L).
        jacobian: J = ∂r_L/∂[v_1 … v_L] of each sample, (B, n_L, Σ n_i).
        target: ``"transpose"`` or ``"pseudoinverse"``.
        damping: γ ≥ 0 of the pseudoinverse. With 0 the Jacobian must have full row rank.

    Returns:
        Degrees, float64.

    Example:
        >>> import torch
        >>> jacobian = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]])
        >>> print(f"{feedback_angle(jacobian[0].T, jacobian, 'transpose'):.2f}")
        0.00
        >>> print(f"{feedback_angle(jacobian[0].T, jacobian):.2f}")
        36.87
    """
    _check(target, damping)
    return _angles(feedback, jacobian, target, damping).mean()


class FeedbackAngle(SampleMean):
    """Angle of the feedback weights to Jᵀ or to its damped pseudoinverse; see :func:`feedback_angle`.

    Args:
        target: ``"transpose"`` or ``"pseudoinverse"``.
        damping: γ ≥ 0 of the pseudoinverse.
        **kwargs: of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> metric = FeedbackAngle("pseudoinverse", damping=0.1)
        >>> jacobian = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]])
        >>> metric.update(jacobian[0].T, jacobian)
        >>> print(f"{metric.compute():.2f}")
        35.22
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 180.0

    def __init__(self, target: FeedbackTarget = "pseudoinverse", damping: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check(target, damping)
        self.target, self.damping = target, damping

    def update(self, feedback: Tensor, jacobian: Tensor) -> None:
        """Count a batch in: the stacked feedback weights, (Σ n_i, n_L) or (B, …), and J, (B, n_L, Σ n_i)."""
        self.add(_angles(feedback, jacobian, self.target, self.damping))


def _check(target: str, damping: float) -> None:
    require(target in ("transpose", "pseudoinverse"), "target", target, 'choose "transpose" or "pseudoinverse"')
    require(damping >= 0, "damping", damping, "give a damping of zero or more")


def _angles(feedback: Tensor, jacobian: Tensor, target: FeedbackTarget, damping: float) -> Tensor:
    gain = (jacobian @ feedback).double()
    if target == "transpose":  # ⟨Q, Jᵀ⟩ = tr JQ
        inner = gain.diagonal(dim1=1, dim2=2).sum(1)
        size = jacobian.square().sum((1, 2)).double()
    else:  # with G = JJᵀ + γI: ⟨Q, JᵀG⁻¹⟩ = tr G⁻¹JQ, ‖JᵀG⁻¹‖² = tr G⁻¹ JJᵀ G⁻¹
        gram = (jacobian @ jacobian.mT).double()
        damped = gram + damping * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        factor, _ = torch.linalg.cholesky_ex(damped)
        inverse = torch.cholesky_inverse(factor)
        inner = (inverse * gain.mT).sum((1, 2))
        size = ((inverse @ gram) * inverse).sum((1, 2))
    cosine = inner / (size * feedback.double().square().sum((-2, -1))).sqrt()
    return torch.rad2deg(torch.acos(cosine.clamp(-1.0, 1.0)))
