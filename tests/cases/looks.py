"""Counts how often the host would wait for a device."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class Looks(TorchDispatchMode):
    """Counts what makes the host wait for data, and answers yes: not yet converged, all sound.

    Whatever else would need data, or a shape that depends on it, is an error of the fake tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default):
            self.count += 1
            return True
        return func(*args, **(kwargs or {}))
