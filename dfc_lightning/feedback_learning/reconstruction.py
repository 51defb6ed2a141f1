"""Layerwise feedback weights that learn to bring back what noise made of a layer (Ernoult et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dfc_lightning.errors import require
from dfc_lightning.feedback_learning.method import FeedbackMethod, Noise
from dfc_lightning.passes.forward_pass import ForwardPass

LEAST_SENT = 1 / 16
"""The mean squared slope of a unit that its weights learn in units of, at least."""


@dataclass(frozen=True)
class DifferenceReconstruction(FeedbackMethod):
    """The local difference reconstruction loss of each layer, −2 εᵀ[G(F(v + ε)) − G(F(v))] + ‖G(F(v) + η) − G(F(v))‖².

    F is the way from the voltages before a layer to its own, G_i(t) = φ(v_{i−1} + B_iᵀ (t − v_i)) the way back, and ε
    and η are white noise, so small that only its direction counts. With M_i the derivative of what the layer hears by
    the voltages before it, of φ, pooling and shortcuts, a step is ΔB_i ∝ ⟨(W_i Mε)(Mε)ᵀ⟩ − ⟨η (MMᵀB_iᵀη)ᵀ⟩, on the
    average (W_i − B_i)⟨MMᵀ⟩: a unit's weights learn while it can send. So that those of a unit that seldom sends do not
    lag behind, each is in units of ⟨(M1)²⟩, the unit's mean squared slope, of ``LEAST_SENT`` at least. Means are over
    samples and over the positions at which a weight of a convolution is used; normalisations have no part in it, as in
    :class:`SampledMirror`.

    Args:
        draws: of the noise in a step, to take the mean of.
    """

    layered: ClassVar[bool] = True

    draws: int = 1

    def __post_init__(self) -> None:
        require(self.draws >= 1, "draws", self.draws, "draw the noise once or more often")

    def gradient(self, forward: ForwardPass, noise: Noise) -> list[Tensor]:
        """Half the gradient of that loss in these units, for each B_i, in its shape."""
        found = [torch.zeros_like(b) for b in forward.feedback]
        sending = [torch.zeros_like(v) for v in forward.v]
        ways = [i for i, hears in enumerate(forward.hears) if hears]
        for _ in range(self.draws):
            heard = forward.one_forth([_like(v, noise) for v in forward.v])
            answers = {i: forward.passed_on(i, heard[i]) for i in ways}
            for i, answer in answers.items():
                sending[i] = _like(answer, noise)
            back = forward.one_forth(forward.one_back(sending, forward.feedback))
            for i, answer in answers.items():
                found[i] += forward.correlation(i, sending[i], back[i]) - forward.correlation(i, answer, heard[i])
        slopes = forward.one_forth([torch.ones_like(v) for v in forward.v])
        for i in ways:
            every = torch.ones_like(sending[i])
            uses = forward.correlation(i, every, torch.ones_like(slopes[i])).clamp_min(1)
            sent = torch.maximum(forward.correlation(i, every, slopes[i].square()), LEAST_SENT * uses)
            found[i] /= self.draws * sent
        return found


def _like(values: Tensor, noise: Noise) -> Tensor:
    """White noise in the shape of ``values``, (B, …)."""
    return noise((values.shape[0], values[0].numel())).view_as(values)
