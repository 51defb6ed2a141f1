"""How well feedback follows the network, by few samples, cheap enough to be looked at in passing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from dfc_lightning.metrics import condition_two
from dfc_lightning.passes.forward_pass import ForwardPass
from dfc_lightning.settling.inverse import DENSE_UP_TO

ROWS = 80
"""Of Jacobians, over all samples by which direct feedback is judged; of one sample at least all."""

MEANS_NOTHING = 0.7
"""Share of a random Q in the row space of J beyond which the share tells nothing."""


def alignment(forward: ForwardPass) -> Tensor | None:
    """How well the feedback weights follow the network, 1 at best; None where there is nothing to follow.

    Of layerwise ones the cosine between B_i and W_i, over all layers through which errors travel back; of direct ones,
    up to ``DENSE_UP_TO`` outputs, the share of Q in the row space of J, Condition 2, less what a random Q has of it,
    √(n_L / Σ n_i), and in units of what is left.

    Args:
        forward: a pass, bound to the feedback weights.
    """
    if forward.layered:
        pairs = [
            (q.flatten().double(), w.detach().flatten().double())
            for q, w, carries in zip(forward.feedback, forward.layer_weights(), forward.hears)
            if carries and w is not None and q.numel()
        ]
        if not pairs:
            return None
        b, w = (torch.cat(each) for each in zip(*pairs))
        return b @ w / (b.norm() * w.norm()).clamp_min(1e-30)
    if not forward.feedback or forward.outputs > DENSE_UP_TO or len(forward.feedback) == 1:
        return None
    count = min(forward.batch_size, max(1, ROWS // forward.outputs))
    some = forward.samples(torch.arange(count, device=forward.output.device))
    jacobian = torch.cat(some.jacobians(), dim=2)
    chance = math.sqrt(jacobian.shape[1] / jacobian.shape[2])
    if chance > MEANS_NOTHING:
        return None
    return torch.nan_to_num((condition_two(some.joint_feedback(), jacobian) - chance) / (1 - chance), nan=1.0)


_ADAPTIVE = (
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
)


def heeds_size(optimizers: Sequence[Optimizer]) -> bool:
    """Whether a step is as much longer as the gradients are larger: so it is by SGD, and not by Adam and its like."""
    return any(not isinstance(each, _ADAPTIVE) for each in optimizers)
