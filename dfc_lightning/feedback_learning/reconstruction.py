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
"""What is added to the mean squared slope of a unit, that its weights learn in units of."""


@dataclass(frozen=True)
class DifferenceReconstruction(FeedbackMethod):
    """The local difference reconstruction loss of each layer, −2 εᵀ[G(F(v + ε)) − G(F(v))] + ‖G(F(v) + η) − G(F(v))‖².

    F is the way from the voltages before a layer to its own, G_i(t) = φ(v_{i−1} + B_iᵀ (t − v_i)) the way back, and ε
    and η are white noise, so small that only its direction counts. With M_i the derivative of what the layer hears by
    the voltages before it, of φ, pooling and shortcuts, a step is ΔB_i ∝ ⟨(W_i Mε)(Mε)ᵀ⟩ − ⟨η (MMᵀB_iᵀη)ᵀ⟩, on the
    average (W_i − B_i)⟨MMᵀ⟩: a unit's weights learn while it can send. So that those of a unit that seldom sends do not
    lag behind, what is descended is in units of ⟨(M1)²⟩, the unit's mean squared slope, and ``LEAST_SENT``. Means are
    over samples and over the positions at which a weight of a convolution is used; normalisations have no part in it,
    as in :class:`SampledMirror`.

    Args:
        draws: of the noise in a step, to take the mean of.
    """

    layered: ClassVar[bool] = True

    draws: int = 1

    def __post_init__(self) -> None:
        require(self.draws >= 1, "draws", self.draws, "draw the noise once or more often")

    def gradient(self, forward: ForwardPass, noise: Noise) -> list[Tensor]:
        """Half the gradient of that loss, for each B_i, in its shape."""
        found = [torch.zeros_like(b) for b in forward.feedback]
        sending = [torch.zeros_like(v) for v in forward.v]
        for _ in range(self.draws):
            heard = forward.one_forth([_like(v, noise) for v in forward.v])
            answers = {i: forward.passed_on(i, heard[i]) for i in _ways(forward)}
            for i, answer in answers.items():
                sending[i] = _like(answer, noise)
            back = forward.one_forth(forward.one_back(sending, forward.feedback))
            for i, answer in answers.items():
                lag = forward.correlation(i, sending[i], back[i]) - forward.correlation(i, answer, heard[i])
                found[i] += lag / (self.draws * _sum(forward, i, torch.ones_like(heard[i])).clamp_min(1))
        return found

    def shares(self, forward: ForwardPass) -> list[Tensor]:
        """⟨(M1)²⟩ + ``LEAST_SENT`` of each weight, in the shape of B_i."""
        slopes = forward.one_forth([torch.ones_like(v) for v in forward.v])
        found = [torch.ones_like(b) for b in forward.feedback]
        for i in _ways(forward):
            uses = _sum(forward, i, torch.ones_like(slopes[i])).clamp_min(1)
            found[i] = _sum(forward, i, slopes[i].square()) / uses + LEAST_SENT
        return found


def _ways(forward: ForwardPass) -> list[int]:
    """The points whose weights errors travel back through."""
    return [i for i, hears in enumerate(forward.hears) if hears]


def _sum(forward: ForwardPass, index: int, heard: Tensor) -> Tensor:
    """What the weights of a point are multiplied with, summed over their uses."""
    return forward.correlation(index, torch.ones_like(forward.passed_on(index, heard)), heard)


def _like(values: Tensor, noise: Noise) -> Tensor:
    """White noise in the shape of ``values``, (B, …)."""
    return noise((values.shape[0], values[0].numel())).view_as(values)
