"""The postsynaptic factor of Eq. (5): what of a settled network is its teaching signal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from dfc_lightning.control.chain import Activity, Chain, Response

Plasticity = Literal["rate_difference", "voltage_difference", "derivative"]
"""``"rate_difference"``: φ(v_i) − φ(v_i^ff), Eq. (5); ``"voltage_difference"``: v_i − v_i^ff; ``"derivative"``:
φ'(v_i⁻)(v_i − v_i^ff), with the slope at the feedforward voltage."""

PLASTICITIES = ("rate_difference", "voltage_difference", "derivative")


def postsynaptic(chain: Chain, activity: Activity, response: Response, plasticity: Plasticity) -> list[Tensor]:
    """:meth:`Chain.postsynaptic`."""
    return chain.postsynaptic(activity, response, plasticity)


def presynaptic(activity: Activity, response: Response) -> list[Tensor]:
    """:meth:`Chain.presynaptic`."""
    return [activity.x, *(r + dr for r, dr in zip(activity.r[:-1], response.rates[:-1]))]
