"""In what precision control is computed, whatever the user's forward passes are rounded to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Without autocast, and on a GPU without TF32, whose three digits are too few for a steady state.

    Torch's default is TF32 in convolutions. Where a program mixes its two ways to say so, which torch refuses to read,
    its settings stay.
    """
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        convolutions = products = None
        with suppress(RuntimeError):
            convolutions = torch.backends.cudnn.allow_tf32
            torch.backends.cudnn.allow_tf32 = False
        with suppress(RuntimeError):
            products = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            if convolutions is not None:
                torch.backends.cudnn.allow_tf32 = convolutions
            if products is not None:
                torch.set_float32_matmul_precision(products)
