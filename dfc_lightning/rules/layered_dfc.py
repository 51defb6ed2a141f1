"""Deep Feedback Control with layered feedback (Meulemans et al. 2021, appendix): what the strategies train by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from dfc_lightning.network.learning_rule import Layerwise
from dfc_lightning.passes.plasticity import Plasticity
from dfc_lightning.rules.dfc import DFC
from dfc_lightning.settling.controller import PIController
from dfc_lightning.settling.settled import Settling
from dfc_lightning.settling.steady_state import SteadyState


@dataclass(frozen=True)
class LayeredDFC(DFC):
    """DFC whose control travels down the layers: a_i = φ'(v_i) ⊙ B_{i+1}ᵀ a_{i+1}, in each sample by its own slopes.

    Where B_i is W_i, a_i is J_iᵀ u for every sample (Conditions 2 and 3), the first order in λ is
    ``MinimumNorm(damping=α, relative=True)``, and α → ∞ is backpropagation through B. Arguments as of :class:`DFC`.
    """

    feedback: ClassVar[Layerwise] = Layerwise(learned=True, tracking=0.0)

    settling: Settling = field(default_factory=lambda: SteadyState(rtol=1e-2))
    controller: PIController = field(default_factory=lambda: PIController(alpha=10.0))
    plasticity: Plasticity = "voltage_difference"
    relative: bool = True
