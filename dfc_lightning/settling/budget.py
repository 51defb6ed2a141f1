"""What a solve may cost, counted in forward passes of the whole batch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Budget:
    """The forward passes that are left.

    A pass of some samples counts by their share of the batch; each of the n_L rows of a gain, pulled back through the
    network, as one pass of the samples it is for.

    Args:
        left: in passes of the batch.
        batch: B.
    """

    left: float
    batch: int

    def spend(self, samples: int, passes: float) -> None:
        """Count ``passes`` of so many samples."""
        self.left -= passes * samples / self.batch

    def each(self, samples: int) -> float:
        """How many passes of so many samples are left."""
        return self.left * self.batch / max(samples, 1)

    def room(self, passes: float) -> int:
        """For how many samples that many passes are left."""
        return int(min(max(self.left, 0.0) * self.batch / passes, self.batch))
