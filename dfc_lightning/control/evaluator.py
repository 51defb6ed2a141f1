"""What rules and monitors ask of a controlled network, be it a chain or any other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from dfc_lightning.control.plasticity import Plasticity


class ForwardPass(Protocol):
    """One feedforward pass over a batch of B samples: an ``Activity`` or a ``GraphActivity``."""

    @property
    def batch_size(self) -> int:
        """B."""

    @property
    def output(self) -> Tensor:
        """The feedforward output r_L⁻, (B, n_L)."""

    @property
    def v(self) -> list[Tensor]:
        """Feedforward voltages v_i⁻, one (B, …) a point."""

    @property
    def slopes(self) -> list[Tensor]:
        """φ' at these, likewise."""

    def presynaptic(self) -> list[Tensor]:
        """What each layer multiplies with its weights."""

    def samples(self, index: Tensor) -> Any:
        """The pass of some samples only."""


class Deviation(Protocol):
    """How the controlled network deviates from feedforward: a ``Response`` or a ``GraphResponse``."""

    @property
    def output(self) -> Tensor:
        """δr_L, (B, n_L)."""

    @property
    def basal(self) -> list[Tensor]:
        """δv_i^ff, one (B, …) a point."""

    @property
    def driven(self) -> list[Tensor]:
        """δv_i − δv_i^ff, likewise."""

    def where(self, keep: Tensor, other: Any = None) -> Any:
        """This deviation for the samples of the mask ``keep``, (B,); ``other``, or none, for the rest."""


class Evaluator(Protocol):
    """A network under control: a ``Chain`` or a ``Graph``, each for the passes and deviations of its own kind."""

    feedback: list[Tensor]
    widths: list[int]

    @property
    def reducible(self) -> bool:
        """Whether the output is wider than the layer before it can move."""

    @property
    def depth(self) -> int:
        """The number of control points, L."""

    @property
    def stacked_feedback(self) -> Tensor:
        """All Q_i one above the other, (Σ n_i, n_L)."""

    def repeat(self, activity: Any) -> Any:
        """The pass of the same input with the weights as they are now."""

    def made_of(self, activity: Any) -> list[Tensor]:
        """The tensors that an update is made of."""

    def apical(self, u: Tensor) -> list[Tensor]:
        """Q_i u of a control signal u, (B, n_L): one (B, n_i) a point."""

    def spread(self, ports: Sequence[Tensor]) -> list[Tensor]:
        """The same in the shape of the voltages."""

    def respond(self, activity: Any, apical: Sequence[Tensor]) -> Any:
        """The controlled feedforward pass: a :class:`Deviation`."""

    def apart(self, activity: Any, apical: Sequence[Tensor]) -> Any:
        """What apical voltages do to each point alone: a :class:`Deviation`."""

    def linear_response(self, activity: Any, apical: Sequence[Tensor]) -> Tensor:
        """First-order output deviation Σ_i J_i a_i, (B, n_L)."""

    def output_gain(self, activity: Any, response: Any = None) -> Tensor:
        """JQ = Σ_i J_i Q_i, (B, n_L, n_L), at the feedforward state or that of a deviation."""

    def mean_gain(self, activity: Any) -> Tensor:
        """JQ for the batch as a whole, (1, n_L, n_L)."""

    def errors(self, activity: Any, output_error: Tensor, live: bool = False) -> list[Tensor]:
        """Backpropagated errors J_iᵀ e, one (B, n_i) a point."""

    def jacobians(self, activity: Any) -> list[Tensor]:
        """J_i = ∂r_L/∂v_i, one (B, n_L, n_i) a point."""

    def postsynaptic(self, activity: Any, response: Any, plasticity: Plasticity) -> list[Tensor]:
        """What the feedback changed in each point."""

    def presynaptic(self, activity: Any, response: Any) -> list[Tensor]:
        """What each layer multiplies with its weights while the network is controlled."""

    def update(
        self, activity: Any, signals: Sequence[Tensor], heard: Sequence[Tensor], scale: float
    ) -> list[list[Tensor]]:
        """``scale`` times what each parameter is taught."""
