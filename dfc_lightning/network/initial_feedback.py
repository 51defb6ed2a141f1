"""Initial values of feedback weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import singledispatch
from typing import Literal

import torch
from torch import Tensor, nn

from dfc_lightning.passes.dense import DensePass
from dfc_lightning.passes.forward_pass import ForwardPass
from dfc_lightning.passes.gram import gram_factor

FeedbackInit = Literal["weight_product", "xavier_normal", "orthogonal", "normal", "jacobian"]
FEEDBACK_INITS = ("weight_product", "xavier_normal", "orthogonal", "normal", "jacobian")

SAMPLES_AT_ONCE = 32
"""Samples of the first batch whose Jacobians are held at a time."""

CLEAR = 4.0
"""From how many times the square that chance leaves a mean over samples is taken as it is."""

FAINT = 1e-3
"""What ‖J_i Q_i‖ is left of a mean that chance explains: it does not count in JQ, but its layer is taught."""


def initial_direct(kind: FeedbackInit, forward: ForwardPass, generator: torch.Generator) -> list[Tensor]:
    """Feedback weights Q_i, (n_i, n_L), for the points of a pass.

    A point that is the output is always given what it needs to hear its own error, the mean of J_iᵀ: the identity
    where it is the whole of the output by itself.

    A mean over samples that is no larger than what chance leaves of so many counts for nothing: see :func:`shrunk`.

    Args:
        kind: ``"weight_product"``: Q_i = Π_{k>i} W_kᵀ, what the paper's fixed feedback is, or for networks that are no
            chains the mean of J_iᵀ over samples; ``"jacobian"``: the mean of J_iᵀ(JJᵀ + γI)⁻¹, an oracle, what
            Theorem 6 has the feedback weights learn; ``"xavier_normal"``, ``"orthogonal"`` and ``"normal"`` (standard
            deviation 0.1) are random.
        forward: a forward pass.
        generator: source of the random kinds, on the CPU.
    """
    if kind == "weight_product":
        return weight_product(forward)
    if kind == "jacobian":
        return _mean_over_samples(forward, pseudoinverse_mean)
    like = [forward.output.new_empty(n, forward.outputs) for n in forward.widths]
    own = _of_output(forward)
    return [own[i] if i in own else _random(kind, q, generator) for i, q in enumerate(like)]


LayerwiseInit = Literal["random", "xavier", "weights"]


def initial_layerwise(kind: LayerwiseInit, weight: Tensor, generator: torch.Generator) -> Tensor:
    """B_i in the shape of W_i: random with the spread of W_i or that of Glorot and Bengio (2010), or a copy of W_i."""
    if kind == "weights":
        return weight.detach().clone()
    drawn = torch.randn(weight.shape, generator=generator, dtype=weight.dtype).to(weight.device)
    return drawn * (xavier_spread(weight) if kind == "xavier" else weight.detach().std(correction=0))


def xavier_spread(weight: Tensor) -> float:
    """√(2 / (fan-in + fan-out))."""
    positions = weight[0, 0].numel()
    return math.sqrt(2 / ((weight.shape[0] + weight.shape[1]) * positions))


@singledispatch
def weight_product(forward: ForwardPass) -> list[Tensor]:
    """The mean of J_iᵀ over samples, as far as they have one in common; of a chain, with all slopes taken as one."""
    found = _mean_over_samples(
        forward, lambda js: [*(j.mean(0).T for j in js), *(j.square().sum((1, 2)).mean() for j in js)]
    )
    means, squares, own = found[: forward.depth], found[forward.depth :], forward.outputs_at
    return [
        q if i in own else shrunk(q, square, forward.batch_size) for i, (q, square) in enumerate(zip(means, squares))
    ]


def shrunk(mean: Tensor, square: Tensor, samples: int) -> Tensor:
    """A mean over samples, taken towards zero where it is lost in their differences.

    Deep in a network without shortcuts the Jacobians of two samples may have next to nothing in common. Their mean is
    then a memory of the batch it was taken of: feedback that drives the next one anywhere, and JQ without a sign.

    Args:
        mean: the mean, of squared norm m².
        square: the mean of the squared norms, s². Chance leaves n² = (s² − m²) / (B − 1) of m².
        samples: B.

    Returns:
        The mean as it is where m² ≥ ``CLEAR`` n², and less in proportion down to m² = n², where no more of it is left
        than makes ‖J_i Q_i‖ ``FAINT``.
    """
    if samples == 1:
        return mean
    norm = mean.square().sum()
    noise = (square - norm).clamp_min(torch.finfo(norm.dtype).tiny) / (samples - 1)
    share = ((norm / noise - 1) / (CLEAR - 1)).clamp(0, 1)
    return mean * torch.maximum(share, (FAINT / (norm * square).sqrt()).clamp(0, FAINT))


@weight_product.register
def _(forward: DensePass) -> list[Tensor]:
    found = [torch.eye(forward.outputs).to(forward.weights[-1])]
    for w in reversed(forward.weights[1:]):
        found.append(w.T @ found[-1])
    return found[::-1]


def pseudoinverse_mean(jacobians: Sequence[Tensor], damping: float = 0.1) -> list[Tensor]:
    """The mean over samples of J_iᵀ(JJᵀ + γI)⁻¹ for Jacobians of each sample, (B, n_L, n_i)."""
    factor = gram_factor(jacobians, damping)
    return [torch.cholesky_solve(j, factor).mean(0).T.contiguous() for j in jacobians]


def _mean_over_samples(forward: ForwardPass, mean: object) -> list[Tensor]:
    assert callable(mean)
    found: list[Tensor] = []
    for some in torch.arange(forward.batch_size, device=forward.output.device).split(SAMPLES_AT_ONCE):
        share = len(some) / forward.batch_size
        part = [share * each for each in mean(forward.samples(some).jacobians())]
        found = [a + b for a, b in zip(found, part)] if found else part
    return found


def _of_output(forward: ForwardPass) -> dict[int, Tensor]:
    """The mean of J_iᵀ over some samples, for the points that are the output."""
    some = forward.samples(torch.arange(min(SAMPLES_AT_ONCE, forward.batch_size), device=forward.output.device))
    columns: dict[int, list[Tensor]] = {i: [] for i in forward.outputs_at}
    for unit in torch.eye(forward.outputs).to(forward.output):
        errors = some.output_errors(unit.expand(some.batch_size, -1))
        ports = some.gathered([torch.zeros_like(v) if e is None else e for e, v in zip(errors, some.v)])
        for i, found in columns.items():
            found.append(ports[i].mean(0))
    return {i: torch.stack(found, dim=1) for i, found in columns.items()}


def _random(kind: FeedbackInit, like: Tensor, generator: torch.Generator) -> Tensor:
    """Random feedback weights of the shape, dtype and device of ``like``."""
    q = torch.empty(like.shape, dtype=like.dtype)
    if kind == "xavier_normal":
        nn.init.xavier_normal_(q, generator=generator)
    elif kind == "orthogonal":
        nn.init.orthogonal_(q, generator=generator)
    else:
        nn.init.normal_(q, std=0.1, generator=generator)
    return q.to(like.device)
