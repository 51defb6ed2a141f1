"""Pseudo-transient continuation: linearly implicit steps of du/dt = F(u) from u = 0.

It goes the way the controller goes when it is much slower than the network, in steps h that grow as long as the
linearisation foretells the outcome, and end as Newton's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dfc_lightning.passes.forward_pass import Deviation
from dfc_lightning.settling.broyden import Root
from dfc_lightning.settling.equation import Equation

STEPS_AN_ITERATION = 5
"""Implicit steps there may be for each iteration that is allowed of Broyden's."""


def continued_root(equation: Equation) -> Root[Deviation]:
    """The nearest point on the way, with an n_L × n_L solve a step and sample."""
    offset, accuracy, a_step = equation.offset, equation.accuracy, equation.forward.outputs + 1
    size = _norm(offset)
    u, value = torch.zeros_like(offset), offset
    response = equation(u)[1]
    equation.spend(1)
    best, nearest = u, size
    rate: Tensor | None = None  # 1 / h
    iterations = 0
    while iterations < STEPS_AN_ITERATION * equation.max_iterations and equation.affords(a_step):
        iterations += 1
        equation.spend(a_step)
        gain = equation.forward.gain(response)
        gain.diagonal(dim1=1, dim2=2).add_(equation.leakage)
        if rate is None:
            rate = torch.linalg.matrix_norm(gain).unsqueeze(1)
        gain.diagonal(dim1=1, dim2=2).add_(rate)
        step = torch.linalg.solve_ex(gain, value.unsqueeze(2))[0].squeeze(2)
        moving = _norm(value) > accuracy * size
        trial = torch.where(moving & torch.isfinite(step).all(1, keepdim=True), u + step, u)
        trial_value, trial_response = equation(trial)
        surprise = _norm(trial_value - rate * step) / _norm(value)
        forward = (step * value).sum(1, keepdim=True) > 0
        accept = (surprise < 0.5) & forward & moving
        u = torch.where(accept, trial, u)
        value = torch.where(accept, trial_value, value)
        response = trial_response.where(accept.squeeze(1), response)
        rate = torch.where(accept, rate * torch.where(surprise < 0.1, 0.1, 0.3).to(rate), rate * 4)
        better = _norm(value) < nearest
        best, nearest = torch.where(better, u, best), torch.where(better, _norm(value), nearest)
        if not moving.any():
            break
    residual = (nearest / size.clamp_min(torch.finfo(size.dtype).tiny)).squeeze(1)
    return Root(best, residual, residual <= accuracy, iterations)


def _norm(value: Tensor) -> Tensor:
    return torch.linalg.vector_norm(value, dim=1, keepdim=True)
