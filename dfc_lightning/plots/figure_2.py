from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dfc_lightning.errors import ControlError, require
from dfc_lightning.plots.canvas import BLUE, GREEN, RED, panels, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DRAWS = 1000
"""How many draws in vain for each configuration asked for there may be."""


@dataclass(frozen=True)
class FeedbackPlane:
    """Feedback weights, each scaled to norm 1, in the plane of the two principal components of them all.

    Args:
        random: configurations that satisfy Conditions 2 and 3, (N, 2).
        ridge: Jᵀ(JJᵀ + γI)⁻¹ for every damping, (G, 2).
        damping: γ of each, (G,), increasing.
        pseudoinverse: J†, (2,).
        transpose: Jᵀ, (2,).
        explained: share of the variance along each of the two components, (2,).
    """

    random: Tensor
    ridge: Tensor
    damping: Tensor
    pseudoinverse: Tensor
    transpose: Tensor
    explained: Tensor


def random_feedback(jacobian: Tensor, count: int, alpha: float, generator: torch.Generator) -> Tensor:
    """Feedback weights Q that satisfy Conditions 2 and 3, (count, Σ n_i, n_L).

    Q = JᵀP with a random P from a normal distribution has the column space of Jᵀ (Condition 2); kept are those with
    Re λ(JQ) > −α for all eigenvalues λ (Condition 3).

    Args:
        jacobian: J of one sample, (n_L, Σ n_i).
        count: how many to return.
        alpha: α, the controller's leakage.
        generator: source of the draws.
    """
    found = jacobian.new_zeros(0, *jacobian.T.shape)
    outputs = len(jacobian)
    for _ in range(_DRAWS):
        mixers = torch.randn(count, outputs, outputs, generator=generator, dtype=jacobian.dtype)
        candidates = jacobian.T @ mixers
        stable = torch.linalg.eigvals(jacobian @ candidates).real.amin(1) > -alpha
        found = torch.cat([found, candidates[stable]])
        if len(found) >= count:
            return found[:count]
    raise ControlError(
        f"jacobian={tuple(jacobian.shape)}: of {count * _DRAWS} random feedback weights only {len(found)} satisfy "
        "Condition 3. Take a network of fewer outputs."
    )


def feedback_plane(jacobian: Tensor, count: int = 2000, alpha: float = 0.0, seed: int = 0) -> FeedbackPlane:
    """Sample the feedback weights that Conditions 2 and 3 allow, beside J's transpose and pseudoinverses.

    Args:
        jacobian: J of one sample, (n_L, Σ n_i), of full row rank.
        count: how many random configurations to draw.
        alpha: the controller's leakage in Condition 3.
        seed: seed of the draws.
    """
    require(jacobian.dim() == 2, "jacobian", tuple(jacobian.shape), "give that of one sample, (n_L, Σ n_i)")
    j = jacobian.double()
    random = random_feedback(j, count, alpha, torch.Generator().manual_seed(seed))
    damping = torch.logspace(-3, 3, 100, dtype=j.dtype)
    gram = j @ j.T + damping.view(-1, 1, 1) * torch.eye(len(j), dtype=j.dtype)
    ridge = j.T @ torch.linalg.inv(gram)
    every = torch.cat([random, ridge, torch.linalg.pinv(j)[None], j.T[None]]).flatten(1)
    every = every / every.norm(dim=1, keepdim=True)
    centred = every - every.mean(0)
    _, strengths, directions = torch.linalg.svd(centred, full_matrices=False)
    projected = centred @ directions[:2].T
    explained = strengths.square() / strengths.square().sum()
    sampled, ridged, (pseudoinverse, transpose) = projected.split([count, len(damping), 2])
    return FeedbackPlane(sampled, ridged, damping, pseudoinverse, transpose, explained[:2])


@styled
def figure_2(plane: FeedbackPlane) -> Figure:
    """Feedback weights that Conditions 2 and 3 allow, in a principal plane: Figure 2 of Meulemans et al. (2021).

    Args:
        plane: from :func:`feedback_plane`.
    """
    figure, (axis,) = panels(1, 1, width=5.6, height=4.0)
    marked: dict[str, Any] = {"s": 90, "marker": "X", "edgecolors": "white"}
    x, y = plane.random.T
    axis.scatter(x, y, s=5, color=BLUE, alpha=0.3, linewidths=0, label="$Q$: Conditions 2 and 3 hold")
    x, y = plane.ridge.T
    path = axis.scatter(x, y, s=14, c=plane.damping.log10(), cmap="plasma", label=r"$J^T(JJ^T + \gamma I)^{-1}$")
    x, y = plane.pseudoinverse
    axis.scatter(x, y, color=GREEN, label=r"$J^\dagger$", **marked)
    x, y = plane.transpose
    axis.scatter(x, y, color=RED, label="$J^T$", **marked)
    figure.colorbar(path, ax=axis, label=r"$\log_{10} \gamma$", shrink=0.7)
    first, second = (f"{float(share):.0%} of variance" for share in plane.explained)
    axis.set(xlabel=f"principal component 1 ({first})", ylabel=f"principal component 2 ({second})", aspect="equal")
    figure.legend(loc="outside upper center", ncols=4, markerscale=1.2, columnspacing=1)
    return figure
