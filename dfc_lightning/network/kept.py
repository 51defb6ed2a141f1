"""The buffers of a module, as they were before a pass that is none of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Undo what becomes of the buffers of a module inside."""
    kept = [
        (m._buffers, name, b, b.clone()) for m in module.modules() for name, b in m._buffers.items() if b is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffers, name, buffer, value in kept:
                buffers[name] = buffer.copy_(value)
