"""The steady state with layered feedback, whose JQ is never formed: an iteration is one pull and one forward pass."""

from __future__ import annotations

import torch

from dfc_lightning.passes.forward_pass import Deviation
from dfc_lightning.settling.broyden import Root, StoredSteps, find_root
from dfc_lightning.settling.equation import Equation


def layered_root(equation: Equation) -> Root[Deviation]:
    """Broyden's root from a JQ that is a number in each sample: its size along δ_L.

    What measures that size, JQ δ_L, gives the first step's outcome to first order, and with it the second step.
    """
    forward, offset, leakage = equation.forward, equation.offset, equation.leakage
    unit = forward.unit
    if unit is None:
        equation.spend(1)
        unit = forward.in_unit(offset).unit
        assert unit is not None
        unit = unit._replace(gained=unit.gained * unit.size)
        size = unit.size
    else:
        size = torch.ones_like(unit.size)
    share = 1 / (size + leakage)
    inverse = StoredSteps(lambda value: value * share)
    first = inverse.step(offset)
    left = offset - share * (unit.gained + leakage * offset)
    inverse.learn(first, left - offset)
    second = inverse.step(left)
    inverse.learn(second, -left)
    found = find_root(equation, first + second, inverse, offset, equation.accuracy, equation.affordable)
    equation.spend(1 + found.iterations)
    return found
