"""Noise of a simulation that is the same however the batch is spread over processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def joint_draws(seed: int, like: Tensor, width: int, keep: Tensor | None = None) -> Callable[[], Tensor]:
    """A source of standard normal draws for the samples of this process, (B, ``width``) at each call.

    Of n processes, rank r has every n-th sample of the joint batch, from the r-th on.

    Args:
        seed: the same for all processes.
        like: of the batch, (B, …).
        width: see above.
        keep: the samples that draws are for, (B,) bool, each given the draws that it has among all; None for all.
    """
    rank, count = 0, 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    generator = torch.Generator(like.device).manual_seed(seed)

    def draw() -> Tensor:
        # In float32 they cost a fourth on a CPU, and noise needs no more digits.
        shape = (len(like) * count, width)
        drawn = torch.randn(shape, generator=generator, device=like.device, dtype=torch.float32)[rank::count]
        return (drawn if keep is None else drawn[keep]).to(like.dtype)

    return draw
