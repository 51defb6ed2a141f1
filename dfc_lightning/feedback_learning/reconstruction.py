"""Layerwise feedback weights that learn to bring back what noise made of a layer (Ernoult et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dfc_lightning.errors import require
from dfc_lightning.feedback_learning.method import FeedbackMethod, Noise
from dfc_lightning.passes.forward_pass import ForwardPass


@dataclass(frozen=True)
class DifferenceReconstruction(FeedbackMethod):
    """The local difference reconstruction loss of each layer, −2 εᵀ[G(F(v + ε)) − G(F(v))] + ‖G(F(v) + η) − G(F(v))‖².

    F is the way from the voltages before a layer to its own, G_i(t) = φ(v_{i−1} + B_iᵀ (t − v_i)) the way back, and ε
    and η are white noise, so small that only its direction counts. With M_i the derivative of what the layer hears by
    the voltages before it, of φ, pooling and shortcuts, a step is ΔB_i ∝ ⟨(W_i Mε)(Mε)ᵀ⟩ − ⟨η (MMᵀB_iᵀη)ᵀ⟩, on the
    average (W_i − B_i)⟨MMᵀ⟩: a unit's weights learn while it can send. The mean is over samples and over the positions
    at which a weight of a convolution is used; normalisations have no part in it, as in :class:`SampledMirror`.

    Args:
        draws: of the noise in a step, to take the mean of.
    """

    layered: ClassVar[bool] = True

    draws: int = 1

    def __post_init__(self) -> None:
        require(self.draws >= 1, "draws", self.draws, "draw the noise once or more often")

    def gradient(self, forward: ForwardPass, noise: Noise) -> list[Tensor]:
        """Half the gradient of that loss, for each B_i, in its shape."""
        drawn = [self._drawn(forward, noise) for _ in range(self.draws)]
        return [torch.stack(each).mean(0) for each in zip(*drawn)]

    def _drawn(self, forward: ForwardPass, noise: Noise) -> list[Tensor]:
        size = forward.batch_size
        ways = [i for i, hears in enumerate(forward.hears) if hears]
        heard = forward.one_forth([noise((size, v[0].numel())).view_as(v) for v in forward.v])
        answers = {i: forward.passed_on(i, heard[i]) for i in ways}
        sent = [torch.zeros_like(v) for v in forward.v]
        for i, answer in answers.items():
            sent[i] = noise((size, answer[0].numel())).view_as(answer)
        back = forward.one_forth(forward.one_back(sent, forward.feedback))
        found = [torch.zeros_like(b) for b in forward.feedback]
        for i, answer in answers.items():
            uses = forward.correlation(i, torch.ones_like(answer), torch.ones_like(heard[i])).clamp_min(1)
            found[i] = (forward.correlation(i, sent[i], back[i]) - forward.correlation(i, answer, heard[i])) / uses
        return found
