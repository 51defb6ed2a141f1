"""Settings with which nothing could be learned are refused where they are given."""

from __future__ import annotations

import math

import pytest

from dfc_lightning import DFC, NudgedTarget, PIController
from dfc_lightning.settling import Euler, Trajectory


@pytest.mark.parametrize("value", [math.inf, math.nan, -1.0])
@pytest.mark.parametrize("name", ["alpha", "k_p"])
def test_gains_are_finite(name, value):
    with pytest.raises(ValueError, match=f"{name}={value} is not possible: give a finite"):
        PIController(**{name: value})


@pytest.mark.parametrize("value", [math.inf, math.nan, 0.0])
def test_target_stepsizes_are_finite(value):
    with pytest.raises(ValueError, match=f"target_stepsize={value} is not possible: give a finite step"):
        NudgedTarget(value)


@pytest.mark.parametrize("settling", [Euler(dt=0.02), Trajectory(dt=0.02)])
def test_a_leak_that_is_unstable_by_itself(settling):
    """u_int ← (1 − α dt) u_int decays in size only for α dt < 2."""
    with pytest.raises(ValueError, match=r"alpha=100\.0 is not possible.*below 100, or a lower dt"):
        DFC(settling=settling, controller=PIController(alpha=100.0))
    DFC(settling=settling, controller=PIController(alpha=99.0))
    DFC(controller=PIController(alpha=100.0))  # no steps of time there
