"""Broyden's method on every sample of a batch at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Root(NamedTuple):
    """The best point seen of each sample."""

    u: Tensor
    """(B, n)."""
    residual: Tensor
    """‖F(u)‖ / ‖scale‖, (B,)."""
    converged: Tensor
    """residual ≤ the accuracy asked for, (B,) bool."""
    iterations: int


def find_root(
    function: Callable[[Tensor], Tensor],
    start: Tensor,
    inverse: Callable[[Tensor], Tensor],
    scale: Tensor,
    accuracy: float,
    max_iterations: int,
) -> Root:
    """Solve F(u) = 0 for each sample by the "good" Broyden method, in its limited-memory form.

    The inverse Jacobian of −F starts as ``inverse`` and gains a rank-one correction a step (Kelley, Iterative
    Methods for Linear and Nonlinear Equations, 1995, sec. 7.3): only the steps themselves are stored. A sample that
    has converged or gone astray stops moving; the best point seen is returned.

    Args:
        function: F, mapping (B, n) to (B, n).
        start: first guess, (B, n).
        inverse: y ↦ approximate (−F')⁻¹ y, mapping (B, n) to (B, n).
        scale: residuals are measured against the norm of this, (B, n).
        accuracy: relative residual to reach.
        max_iterations: evaluations of F after the first.
    """
    size = torch.linalg.vector_norm(scale, dim=1)
    tiny = torch.finfo(start.dtype).tiny

    def measure(value: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(value, dim=1) / size.clamp_min(tiny)
        return torch.where(size > 0, norm, torch.zeros_like(norm))

    u = torch.where(torch.isfinite(start).all(1, keepdim=True), start, torch.zeros_like(start))
    value = function(u)
    residual = measure(value)
    if not (residual <= 1).all():  # the guess is worse than none
        u = torch.where((residual <= 1).unsqueeze(1), u, torch.zeros_like(u))
        value = function(u)
        residual = measure(value)
    best_u, best_residual = u, torch.where(torch.isfinite(residual), residual, torch.inf)
    steps: list[Tensor] = []
    norms: list[Tensor] = []
    iterations = 0
    for iterations in range(1, max_iterations + 1):
        active = (best_residual > accuracy) & torch.isfinite(residual) & (residual < 10 * best_residual)
        if not active.any():
            iterations -= 1
            break
        step = inverse(value)
        for s, following, norm in zip(steps[:-1], steps[1:], norms[:-1]):
            step = step + following * ((s * step).sum(1, keepdim=True) / norm)
        if steps:
            ratio = (steps[-1] * step).sum(1, keepdim=True) / norms[-1]
            # The correction divides by 1 − ratio: near one, keep the uncorrected step.
            step = step / torch.where((1 - ratio).abs() > 0.1, 1 - ratio, torch.ones_like(ratio))
        step = torch.where(active.unsqueeze(1), step, torch.zeros_like(step))
        steps.append(step)
        norms.append((step * step).sum(1, keepdim=True).clamp_min(tiny))
        u = u + step
        value = function(u)
        residual = measure(value)
        better = residual < best_residual
        best_u = torch.where(better.unsqueeze(1), u, best_u)
        best_residual = torch.where(better, residual, best_residual)
    return Root(best_u, best_residual, best_residual <= accuracy, iterations)
