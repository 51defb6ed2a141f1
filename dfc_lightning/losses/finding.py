"""Finding the output's own nonlinearity, and the scale of the loss, from the loss's gradient at other outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dfc_lightning.errors import ControlError, require
from dfc_lightning.losses.link import LINKS, Link, linked
from dfc_lightning.losses.linked_loss import ROUNDING, LinkedLoss

DIGITS = 8
"""Units of rounding by which gradients may miss what they should be."""
FAR = 10.0
"""How far outputs go to see whether a loss stays of its kind."""
REMEDY = (
    "Name the rule's link if the loss is of its kind after all, choose mean squared error, cross entropy or binary "
    "cross entropy of logits, or train by DFC(), which takes any loss."
)


class _Fit(NamedTuple):
    """A gradient taken for c (g(r) − y).

    Args:
        link: g.
        scale: c, (B, 1) or (B, n_L).
        label: y, (B, n_L).
        miss: the part of a gradient's change with the output that is not c g's, the worst of all outputs tried.
    """

    link: Link
    scale: Tensor
    label: Tensor
    miss: float


def find_link(loss: Callable[[Tensor], Tensor], output: Tensor, loss_reduction: str = "mean") -> LinkedLoss:
    """What a loss wants of the output, from its gradient at this output and at three others.

    Args:
        loss: the loss of the batch, a scalar, by the output, (B, n_L); called four times, of the same labels.
        output: r_L, (B, n_L).
        loss_reduction: ``"mean"`` if the loss is a mean over the batch, ``"sum"`` if it is a sum.

    Returns:
        The loss's g and its scale c, ∂ℓ_b/∂r_L = c (g(r_L) − y); no scale where samples have weights of their own.

    Raises:
        ControlError: the gradient is not of that form, or does not tell y; the message says why.

    Example:
        >>> y = torch.tensor([0, 2])
        >>> find_link(lambda r: 3 * torch.nn.functional.cross_entropy(r, y, label_smoothing=0.1), torch.randn(2, 4))
        LinkedLoss(link='softmax', scale=3.0, hard=False)
    """
    require(loss_reduction in ("mean", "sum"), "loss_reduction", loss_reduction, 'choose "mean" or "sum"')
    share = len(output) if loss_reduction == "mean" else 1
    tolerance = max(1e-3, DIGITS * torch.finfo(output.dtype).eps)
    outputs = [*_elsewhere(output), output.detach()]
    gradients = [_gradient(loss, r, share) for r in outputs]
    outputs = [r.to(gradients[0].dtype) for r in outputs]
    if not all(bool(g.isfinite().all()) for g in gradients):
        raise _refused(f"it is not finite at other outputs, of the size of 1 to {FAR:g}")
    fits = [_fit(link, outputs, gradients) for link in LINKS]
    best = min(fits, key=lambda fit: fit.miss)
    flat = DIGITS * torch.finfo(gradients[0].dtype).eps * _size(gradients[0])
    if best.miss > tolerance or _size(gradients[1] - gradients[0]) <= flat:
        at = outputs[0].to(output.dtype)
        again, near_by = _gradient(loss, at, share), _gradient(loss, 1.01 * at, share)
        raise _refused(_behaviour(gradients, again, near_by, tolerance, best))
    return _known(best, tolerance)


def _behaviour(gradients: list[Tensor], again: Tensor, near_by: Tensor, tolerance: float, nearest: _Fit) -> str:
    """What keeps a gradient from being c (g(r) − y), told with its like at the first output and beside it."""
    first = gradients[0]
    if not any(bool(g.any()) for g in gradients):
        return "it is zero"
    if _size(again - first) > tolerance * _size(first):
        return "it differs when the loss is computed again, so that chance has a part in the label or in the loss"
    if _size(near_by - first) <= tolerance * _size(first):
        return "it does not change with the output, or only in jumps, as of absolute errors and hinge losses"
    return (
        f"it is not c (g(r_L) − y) with one label y for all outputs r_L; the nearest g, {nearest.link!r}, misses by "
        f"{nearest.miss:.0%} of how it changes"
    )


def _elsewhere(output: Tensor) -> list[Tensor]:
    """Two outputs at a distance of 1 or more in every unit, where no g is flat, and one far away."""
    drawing = torch.Generator().manual_seed(0)
    draw = torch.rand(3, *output.shape, generator=drawing).to(output.device)
    side = torch.where(torch.rand(output.shape, generator=drawing).to(output.device) < 0.5, -1.0, 1.0)
    near, opposite = side * (0.5 + draw[0]), -side * (0.5 + draw[1])
    return [r.to(output.dtype) for r in (near, opposite, FAR * (2 * draw[2] - 1))]


def _gradient(loss: Callable[[Tensor], Tensor], output: Tensor, share: int) -> Tensor:
    """∂ℓ_b/∂r_L, (B, n_L), in float32 at least; ``share`` is what the loss's mean is over."""
    leaf, grad = output.detach().requires_grad_(), None
    with torch.enable_grad():
        value = loss(leaf)
        if isinstance(value, Tensor) and value.requires_grad:
            (grad,) = torch.autograd.grad(value * share, leaf, allow_unused=True)
    if grad is None:
        raise _refused("there is none: the loss does not depend on the output")
    return grad.to(torch.promote_types(grad.dtype, torch.float32))


def _fit(link: Link, outputs: list[Tensor], gradients: list[Tensor]) -> _Fit:
    """Find c from the first two outputs, and how far all others agree."""
    values = [linked(link, r) for r in outputs]
    rise, step = gradients[0] - gradients[1], values[0] - values[1]
    if link == "softmax":  # one c a sample: what a unit is wanted to be depends on the others
        scale = (rise * step).sum(1, keepdim=True) / (step * step).sum(1, keepdim=True)
    else:
        scale = rise / step
    scale = torch.nan_to_num(scale, 0.0, 0.0, 0.0)
    label = values[0] - torch.nan_to_num(gradients[0] / scale, 0.0, 0.0, 0.0)
    misses = []
    for value, gradient in zip(values[1:], gradients[1:]):
        change = scale * (value - values[0])
        size = _size(gradient - gradients[0]) + _size(change)
        misses.append(_size(gradient - gradients[0] - change) / max(size, 1e-30))
    return _Fit(link, scale, label, max(misses))


def _known(fit: _Fit, tolerance: float) -> LinkedLoss:
    """The loss, if one gradient tells its label."""
    weighed = fit.scale.abs() > tolerance * fit.scale.abs().amax()
    if bool((fit.scale[weighed] < 0).any()):
        raise _refused(
            f"it leads away from a label, by a scale of {float(fit.scale.min()):g}: the loss grows towards it"
        )
    y, weighed = fit.label, weighed.expand_as(fit.label)
    if fit.link != "identity" and bool(((y < -ROUNDING) | (y > 1 + ROUNDING))[weighed].any()):
        raise _refused(f"it tells of labels that are no probabilities, from {float(y.min()):g} to {float(y.max()):g}")
    hard = fit.link != "identity" and bool(torch.minimum(y.abs(), (y - 1).abs())[weighed].max() < ROUNDING)
    least, most = float(fit.scale.min()), float(fit.scale.max())
    if most - least <= 2 * tolerance * most:
        return LinkedLoss(fit.link, _simple(float(fit.scale.mean()), tolerance / 10), hard)
    if not hard:
        raise _refused(
            f"samples or outputs have weights of their own, from {least:.3g} to {most:.3g}, and one gradient does not "
            "tell them apart from labels that are not 0 and 1. Leave the weights or, by cross entropy, the softening "
            "of labels"
        )
    return LinkedLoss(fit.link, None, hard)


def _simple(scale: float, accuracy: float) -> float:
    """The simplest fraction so near, that c may be the same whichever batch it is found from; else c as it is."""
    large = max(scale, 1 / scale)
    for under in range(1, 100):
        over = round(large * under)
        if abs(over / under - large) <= accuracy * large:
            return over / under if scale >= 1 else under / over
    return scale


def _size(gradient: Tensor) -> float:
    return float(torch.linalg.vector_norm(gradient))


def _refused(reason: str) -> ControlError:
    return ControlError(f"What the loss wants of the output cannot be told from its gradient: {reason}. {REMEDY}")
