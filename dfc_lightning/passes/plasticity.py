"""The postsynaptic factor of Eq. (5): what of a settled network is its teaching signal."""

from __future__ import annotations

from typing import Literal

Plasticity = Literal["rate_difference", "voltage_difference", "derivative"]
"""``"rate_difference"``: φ(v_i) − φ(v_i^ff), Eq. (5); ``"voltage_difference"``: v_i − v_i^ff; ``"derivative"``:
φ'(v_i⁻)(v_i − v_i^ff), with the slope at the feedforward voltage."""

PLASTICITIES = ("rate_difference", "voltage_difference", "derivative")
