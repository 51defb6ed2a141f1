from __future__ import annotations

import math

from torch import Tensor


class DataError(ValueError):
    """Data that cannot be used; the message names the file and the remedy."""


def require_finite(values: Tensor, what: str) -> None:
    """Refuse values that are no numbers, which training would spread to every weight.

    Args:
        values: any tensor.
        what: what it is, for the error.

    Raises:
        DataError: one is NaN or infinite.
    """
    if not values.is_floating_point() or values.numel() == 0:
        return
    if not all(math.isfinite(float(bound)) for bound in values.aminmax()):  # NaN passes through both
        raise DataError(f"{what} hold NaN or infinity: remove those samples, or replace the file they come from.")
