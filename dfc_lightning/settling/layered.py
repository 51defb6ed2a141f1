"""The steady state with layered feedback, whose JQ is never formed: an iteration is one pull and one forward pass."""

from __future__ import annotations

import torch

from dfc_lightning.passes.forward_pass import Deviation
from dfc_lightning.settling.broyden import Root, StoredSteps
from dfc_lightning.settling.equation import Equation


def layered_root(equation: Equation) -> Root[Deviation]:
    """Broyden's root from a JQ that is a number in each sample: its size along δ_L.

    What measures that size, JQ δ_L, gives the first step's outcome to first order, and with it the second step.
    """
    offset, leakage, unit = equation.offset, equation.leakage, equation.forward.unit
    if unit is None:
        equation.spend(1)
        found = equation.forward.in_unit(offset).unit
        assert found is not None
        size, gained = found.size, found.gained * found.size
    else:
        size, gained = torch.ones_like(unit.size), unit.gained
    share = 1 / (size + leakage)
    inverse = StoredSteps(lambda value: value * share)
    first = inverse.step(offset)
    left = offset - share * (gained + leakage * offset)
    inverse.learn(first, left - offset)
    second = inverse.step(left)
    inverse.learn(second, -left)
    return equation.root(inverse, first + second)
