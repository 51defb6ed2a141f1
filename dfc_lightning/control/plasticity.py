"""From a settled network to its teaching signals: the postsynaptic factor of Eq. (5)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dfc_lightning.control.chain import Activity, Chain, Response

Plasticity = Literal["rate_difference", "voltage_difference", "derivative"]
PLASTICITIES = ("rate_difference", "voltage_difference", "derivative")


def postsynaptic(chain: Chain, activity: Activity, response: Response, plasticity: Plasticity) -> list[Tensor]:
    """What the feedback changed in each layer, one (B, n_i) a layer.

    Args:
        chain: the controlled chain.
        activity: its feedforward activity.
        response: its controlled deviation from it.
        plasticity: ``"rate_difference"``: φ(v_i) − φ(v_i^ff), Eq. (5); ``"voltage_difference"``: v_i − v_i^ff;
            ``"derivative"``: φ'(v_i⁻)(v_i − v_i^ff), with the slope at the feedforward voltage.
    """
    if plasticity == "voltage_difference":
        return list(response.driven)
    if plasticity == "derivative":
        return [slope * drive for slope, drive in zip(activity.slopes, response.driven)]
    found = [response.rates[0]]  # nothing upstream of the first layer moves: v_1^ff is the feedforward voltage
    for i in range(1, chain.depth):
        phi, v, r, slope = chain.nonlinearities[i], activity.v[i], activity.r[i], activity.slopes[i]
        if response.delayed:
            at = v + response.basal[i]
            found.append(phi.difference(at, phi(at), response.driven[i]))
        else:
            found.append(response.rates[i] - phi.difference(v, r, response.basal[i], slope))
    return found


def presynaptic(activity: Activity, response: Response) -> list[Tensor]:
    """The controlled rates r_{i−1} each layer i hears, the first being the input x."""
    return [activity.x, *(r + dr for r, dr in zip(activity.r[:-1], response.rates[:-1]))]
