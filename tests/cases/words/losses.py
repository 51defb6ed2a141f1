"""What is made of a module's output, and how often."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from cases.grammar import Grown


def through_hidden(m: Grown, x: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(m(x), y)
    return loss + sum((h.square().mean() for h in m.hidden), start=loss.new_zeros(()))


def with_decay(m: Grown, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m(x), y) + 0.01 * sum(p.square().sum() for p in m.parameters() if p.requires_grad)


def squared(m: Grown, x: Tensor, y: Tensor) -> Tensor:
    out = m(x)
    return F.mse_loss(out, F.one_hot(y, out.shape[1]).to(out))


def mixed(m: Grown, x: Tensor, y: Tensor) -> Tensor:
    out = m(x)
    return F.cross_entropy(out.log_softmax(1), y) + 0.1 * out.softmax(1).square().mean() + out.mean().square()


LOSSES: list[tuple[str, Callable[[Grown, Tensor, Tensor], Tensor], str, float]] = [
    ("cross-entropy", lambda m, x, y: F.cross_entropy(m(x), y), "mean", 6),
    ("its sum", lambda m, x, y: F.cross_entropy(m(x), y, reduction="sum"), "sum", 1),
    ("squares", squared, "mean", 2),
    ("mixed", mixed, "mean", 1),
    ("decay", with_decay, "mean", 1),
    ("hidden", through_hidden, "mean", 2),
]
