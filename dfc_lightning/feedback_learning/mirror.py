"""The weight mirror (Akrout et al. 2019): layerwise feedback weights learn what a layer makes of noise in its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dfc_lightning.feedback_learning.method import FeedbackMethod, Noise
from dfc_lightning.passes.forward_pass import ForwardPass


@dataclass(frozen=True)
class SampledMirror(FeedbackMethod):
    """ΔB_i ∝ ⟨(W_i ξ) ξᵀ⟩ − B_i, with white noise ξ of unit variance for what a layer hears, one layer at a time.

    The mean is over the samples and over the positions at which a weight of a convolution is used, so that
    E⟨(W_i ξ) ξᵀ⟩ = W_i. What follows the layer, normalisation and nonlinearity, has no part in it, and points through
    which no error travels back learn none. To be descended with ``FeedbackLearning(optimizer="sgd")``: B_i is then a
    running mean of ``lr``.
    """

    layered: ClassVar[bool] = True

    def gradient(self, forward: ForwardPass, noise: Noise) -> list[Tensor]:
        """B_i − ⟨(W_i ξ) ξᵀ⟩ of each point, in the shape of B_i."""
        return [
            b - self._mirrored(forward, i, noise) if hears else torch.zeros_like(b)
            for i, (b, hears) in enumerate(zip(forward.feedback, forward.hears))
        ]

    def _mirrored(self, forward: ForwardPass, index: int, noise: Noise) -> Tensor:
        heard = forward.presynaptic[index]
        drawn = noise((heard.shape[0], heard[0].numel())).view_as(heard)
        answer = forward.passed_on(index, drawn)
        uses = forward.correlation(index, torch.ones_like(answer), torch.ones_like(drawn))
        return forward.correlation(index, answer, drawn) / uses.clamp_min(1)


@dataclass(frozen=True)
class ExpectedMirror(FeedbackMethod):
    """The mean over the noise of what :class:`SampledMirror` computes: ΔB_i ∝ W_i − B_i."""

    layered: ClassVar[bool] = True

    def gradient(self, forward: ForwardPass, noise: Noise) -> list[Tensor]:
        """B_i − W_i of each point, in the shape of B_i."""
        each = zip(forward.feedback, forward.layer_weights(), forward.hears)
        return [b - w if w is not None and hears else torch.zeros_like(b) for b, w, hears in each]
