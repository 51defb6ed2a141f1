"""Are two tensors the same but for rounding?"""

from __future__ import annotations

import torch
from torch import Tensor


def alike(found: Tensor, expected: Tensor, rtol: float, share: float) -> bool:
    """Whether ``found`` is ``expected``: entries to ``rtol`` of themselves, or to ``share`` of the largest finite one.

    A sample that is not finite is alike in that too. What is no float must be equal.
    """
    if not expected.is_floating_point() or not expected.numel():
        return torch.equal(found, expected)
    largest = float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max())
    return torch.allclose(found, expected, rtol, share * largest, equal_nan=True)
