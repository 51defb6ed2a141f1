"""Random draws of a rule for one batch: the same whether one process has it, or several have their shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chance:
    """Standard normal draws that follow from a seed and the number of the batch.

    Args:
        seed: the run's.
        step: the batch's number.
        rank: of n processes, this one has every n-th sample of the joint batch, from the one of this number on.
        world_size: n.
        device: where the draws are made.
    """

    seed: int
    step: int
    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")

    def drawing(self) -> Drawing:
        """The batch's draws from the first on: the same again at each call, for monitors that have a rule teach."""
        return Drawing(self)


class Drawing:
    """Draws one after the other.

    Args:
        chance: whose they are.
    """

    def __init__(self, chance: Chance) -> None:
        self.chance = chance
        self._generator = torch.Generator(chance.device).manual_seed(mixed(chance.seed, chance.step))

    def shared(self, shape: Sequence[int]) -> Tensor:
        """The same on all processes; float32."""
        generator, device = self._generator, self.chance.device
        return torch.randn(tuple(shape), generator=generator, device=device, dtype=torch.float32)

    def of_samples(self, shape: Sequence[int]) -> Tensor:
        """For the samples in dimension 0, out of draws for the joint batch; float32."""
        joint = self.shared((shape[0] * self.chance.world_size, *shape[1:]))
        return joint[self.chance.rank :: self.chance.world_size]


def mixed(seed: int, step: int) -> int:
    """A seed for each step: neighbouring seeds and steps must not share noise."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**63
