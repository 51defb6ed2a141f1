"""The output's own nonlinearity g, by which the error of a label is e = y − g(r_L)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Link = Literal["softmax", "identity"]
LINKS = ("softmax", "identity")


def linked(link: Link, output: Tensor) -> Tensor:
    """g(r_L), (B, n_L)."""
    return torch.softmax(output, dim=1) if link == "softmax" else output
