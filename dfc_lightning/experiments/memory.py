"""The most memory that a run has held."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch


class PeakMemory:
    """Bytes held at the most since it was made: on a GPU the allocator's, otherwise those of the whole process.

    A process's peak can be told and reset on Linux alone.
    """

    def __init__(self) -> None:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew

    def read(self, device: torch.device) -> int | None:
        """The peak where ``device`` keeps its tensors; None where it cannot be told."""
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        return _most_resident() if device.type == "cpu" else None


def _most_resident() -> int | None:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None
