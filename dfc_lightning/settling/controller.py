"""The feedback controller: τ_u du_int/dt = e − leak, u = u_int + k_p e (Meulemans et al. 2021, Eq. 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from dfc_lightning.errors import require


@dataclass(frozen=True)
class PIController:
    """A leaky proportional-integral controller of the network's output.

    Args:
        alpha: leakage of the integral part, α ≥ 0 and finite. The settled output misses its target by α̃ u.
        k_p: proportional gain, k_p ≥ 0 and finite, in units of the integral gain.
        leak: what leaks. ``"integral"``: τ_u du_int/dt = e − α u_int, as the paper's Eq. (4) has it.
            ``"control"``: τ_u du_int/dt = e − α u, as the authors' published code has it.
    """

    alpha: float = 1e-3
    k_p: float = 0.0
    leak: Literal["integral", "control"] = "integral"

    def __post_init__(self) -> None:
        remedy = "give a finite leakage of zero or more, e.g. 1e-3"
        require(0 <= self.alpha < math.inf, "alpha", self.alpha, remedy)
        remedy = "give a finite proportional gain of zero or more, e.g. 2.0"
        require(0 <= self.k_p < math.inf, "k_p", self.k_p, remedy)
        require(self.leak in ("integral", "control"), "leak", self.leak, 'choose "integral" or "control"')

    @property
    def steady_leakage(self) -> float:
        """α̃ of the settled state, e = α̃ u: α with the leak on the control, else α / (1 + α k_p)."""
        return self.alpha if self.leak == "control" else self.alpha / (1 + self.alpha * self.k_p)
