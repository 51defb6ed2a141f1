"""Broyden's method on every sample of a batch at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

LOOK_EVERY = 4
"""Iterations on a GPU from one look at whether all samples have converged to the next."""


Aux = TypeVar("Aux")


@dataclass(frozen=True)
class Root(Generic[Aux]):
    """The best point seen of each sample.

    Args:
        u: (B, n).
        residual: ‖F(u)‖ / ‖F(0)‖, (B,), or as measured otherwise.
        converged: residual ≤ the accuracy asked for, (B,) bool.
        iterations: evaluations of F after the first.
        aux: what F has returned beside its value at this point; None if that is not at hand, some sample having been
            taken back to an earlier point.
    """

    u: Tensor
    residual: Tensor
    converged: Tensor
    iterations: int
    aux: Aux | None = None

    def improved(self, late: Tensor, found: Root[Any]) -> Root[Aux]:
        """This, with the samples of the mask ``late``, (B,), moved to where ``found`` is nearer, and its iterations."""
        nearer = found.residual < self.residual[late]
        u = torch.where(nearer.unsqueeze(1), found.u, self.u[late])
        return Root(
            self.u.index_put((late,), u),
            self.residual.index_put((late,), torch.where(nearer, found.residual, self.residual[late])),
            self.converged.index_put((late,), found.converged & nearer),
            self.iterations + found.iterations,
        )


class Inverse(Protocol):
    """An approximate inverse of −F' that learns from the steps taken."""

    def step(self, value: Tensor) -> Tensor:
        """The quasi-Newton step for F(u) = ``value``, (B, n)."""

    def learn(self, step: Tensor, change: Tensor) -> None:
        """Take into account that ``step`` has changed F by ``change``."""


class DenseInverse:
    """Holds the inverse as a matrix a sample, (B, n, n), and corrects it by the Sherman-Morrison formula.

    Args:
        matrix: the first guess, (B, n, n), or (1, n, n) for all samples alike.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def step(self, value: Tensor) -> Tensor:
        if self.matrix.shape[0] == 1:
            return value @ self.matrix[0].T
        return torch.bmm(self.matrix, value.unsqueeze(2)).squeeze(2)

    def learn(self, step: Tensor, change: Tensor) -> None:
        matrix = self.matrix.expand(len(step), -1, -1)
        predicted = self.step(change).neg_()  # what the inverse says has caused the change
        along = torch.bmm(step.unsqueeze(1), matrix)
        overlap = torch.linalg.vecdot(step, predicted)
        sound = overlap.abs() > 0.1 * torch.linalg.vecdot(step, step)
        weight = torch.where(sound, overlap, torch.inf).unsqueeze(1)
        self.matrix = torch.baddbmm(matrix, ((step - predicted) / weight).unsqueeze(2), along)


class StoredSteps:
    """Holds a first guess of the inverse and the steps taken, from which its corrections follow.

    The limited-memory form of Kelley, Iterative Methods for Linear and Nonlinear Equations (1995), sec. 7.3.

    Args:
        solve: y ↦ approximate (−F')⁻¹ y, mapping (B, n) to (B, n).
    """

    def __init__(self, solve: Callable[[Tensor], Tensor]) -> None:
        self.solve = solve
        self.steps: list[Tensor] = []
        self.norms: list[Tensor] = []

    def step(self, value: Tensor) -> Tensor:
        step = self.solve(value)
        for s, following, norm in zip(self.steps[:-1], self.steps[1:], self.norms[:-1]):
            step = step + following * ((s * step).sum(1, keepdim=True) / norm)
        if self.steps:
            ratio = (self.steps[-1] * step).sum(1, keepdim=True) / self.norms[-1]
            # The correction divides by 1 − ratio: near zero, keep the uncorrected step.
            step = step / torch.where((1 - ratio).abs() > 0.1, 1 - ratio, torch.ones_like(ratio))
        return step

    def learn(self, step: Tensor, change: Tensor) -> None:
        self.steps.append(step)
        self.norms.append((step * step).sum(1, keepdim=True).clamp_min(torch.finfo(step.dtype).tiny))


def find_root(
    function: Callable[[Tensor], tuple[Tensor, Aux]],
    start: Tensor,
    inverse: Inverse,
    at_zero: Tensor,
    accuracy: float,
    max_iterations: int,
    measure: Callable[[Tensor], Tensor] | None = None,
) -> Root[Aux]:
    """Solve F(u) = 0 for each sample by the "good" Broyden method.

    A sample that has converged or gone astray stops moving; the best point seen is returned. On a GPU the host looks at
    the residuals at every fourth iteration, and once in the end if F returns something beside its value.

    Args:
        function: F, mapping (B, n) to (B, n) and something more, None for nothing, for :attr:`Root.aux`.
        start: first guess, (B, n).
        inverse: approximate inverse of −F'.
        at_zero: F(0), (B, n). A sample whose first guess is worse begins at zero.
        accuracy: relative residual to reach.
        max_iterations: evaluations of F after the first.
        measure: residuals of values of F, mapping (B, n) to (B,); None for ‖F(u)‖ / ‖F(0)‖.
    """
    size = torch.linalg.vector_norm(at_zero, dim=1).clamp_min(torch.finfo(start.dtype).tiny)
    measure = measure or (lambda value: torch.linalg.vector_norm(value, dim=1) / size)
    start = torch.where(torch.isfinite(start).all(1, keepdim=True), start, 0.0)
    # Waiting for a GPU costs more than a few iterations in vain, which leave a sample that has arrived where it is.
    look_every = 1 if start.device.type == "cpu" else LOOK_EVERY
    value, aux = function(start)
    evaluated = start
    residual, none = measure(value), measure(at_zero)
    sound = (residual <= none).unsqueeze(1)
    u, value = torch.where(sound, start, 0.0), torch.where(sound, value, at_zero)
    residual = torch.where(sound.squeeze(1), residual, none)
    best_u, best_residual = u, torch.where(torch.isfinite(residual), residual, torch.inf)
    iterations = 0
    while iterations < max_iterations:
        active = (best_residual > accuracy) & (residual < 10 * best_residual)
        if (iterations + 1) % look_every == 0 and not active.any():
            break
        iterations += 1
        step = torch.where(active.unsqueeze(1), inverse.step(value), 0.0)
        u, before = u + step, value
        value, aux = function(u)
        evaluated = u
        inverse.learn(step, value - before)
        residual = measure(value)
        better = residual < best_residual
        best_u = torch.where(better.unsqueeze(1), u, best_u)
        best_residual = torch.where(better, residual, best_residual)
    same = aux is not None and torch.equal(evaluated, best_u)
    return Root(best_u, best_residual, best_residual <= accuracy, iterations, aux if same else None)
