"""Learning the feedback weights from noise while the network is driven to its labels (Meulemans et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from dfc_lightning.errors import ControlError, require
from dfc_lightning.feedback_learning.method import FeedbackMethod, Noise
from dfc_lightning.losses.link import Link
from dfc_lightning.losses.linked_loss import LinkedLoss, check_link
from dfc_lightning.passes.forward_pass import ForwardPass
from dfc_lightning.settling.controller import PIController
from dfc_lightning.settling.strong_simulation import StrongSimulation


def _simulation() -> StrongSimulation:
    return StrongSimulation(dt=2e-3, tau_ratio=0.01, apical_tau=0.2, sigma=0.15)


def _controller() -> PIController:
    return PIController(alpha=0.5, k_p=0.1, leak="control")


@dataclass(frozen=True)
class StrongSampled(FeedbackMethod):
    """ΔQ_i ∝ −(1 + τ_v/τ_ε)^{L−i} v_i^fb ũᵀ / σ_i², the output driven to its label under noise.

    The feedback phase of :class:`TwoPhaseStrongDFC`, and what the feedback weights of :class:`StrongDFC` learn by
    before training. A pass runs the user's ``training_step`` to its end, as the label is in the loss.

    Args:
        settling: the simulation; it has to have noise.
        controller: the controller of this phase.
        link: the output's own nonlinearity g, as of the rule; None to have it found by the strategy.
        tau_f: time constant of the low-pass that the control is freed of; None for ũ = u.
        layer_gain: what stands for 1 + τ_v/τ_ε above; None for that, which is 1 where the noise is white.
    """

    needs_loss: ClassVar[bool] = True

    settling: StrongSimulation = field(default_factory=_simulation)
    controller: PIController = field(default_factory=_controller)
    link: Link | LinkedLoss | None = None
    tau_f: float | None = None
    layer_gain: float | None = None

    def __post_init__(self) -> None:
        check_link(self.link)
        remedy = "feedback weights learn from noise; give settling.sigma a value above zero"
        require(self.settling.sigma > 0, "sigma", self.settling.sigma, remedy)
        remedy = f"the step dt={self.settling.dt} is larger than this time constant; lower dt or raise it"
        require(self.tau_f is None or self.settling.dt <= self.tau_f, "tau_f", self.tau_f, remedy)

    def towards(self, loss_grad: Tensor) -> FeedbackMethod:
        return _Towards(self, loss_grad)

    def gradient(self, forward: ForwardPass, noise: Noise) -> list[Tensor]:
        raise ControlError(
            "StrongSampled drives the network to its labels, and has been given none. Give the gradient of each "
            "sample's loss, FeedbackLearner.step(forward, loss_grad=…)."
        )


@dataclass(frozen=True)
class _Towards(FeedbackMethod):
    """The method for one batch.

    Args:
        method: the method.
        loss_grad: ∂ℓ_b/∂r_L of each sample's own loss, (B, n_L).
    """

    method: StrongSampled
    loss_grad: Tensor

    def gradient(self, forward: ForwardPass, noise: Noise) -> list[Tensor]:
        method, shape = self.method, (forward.batch_size, sum(forward.widths))
        label = forward.label(self.loss_grad, method.link)
        simulation = method.settling
        found = simulation.run(
            forward,
            label.offset,
            label.link,
            method.controller,
            lambda: noise(shape),
            filtered=0.0 if method.tau_f is None else simulation.dt / method.tau_f,
            layer_gain=method.layer_gain,
        ).feedback
        assert found is not None
        return found
