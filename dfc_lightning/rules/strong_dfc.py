"""Strong-DFC (Meulemans et al. 2022, "Minimizing Control for Credit Assignment with Strong Feedback").

The output is driven the whole way to its label, e = y − g(r_L), by strong feedback, and each weight learns to make the
help superfluous: in the end what is minimised is the control itself, H = ‖Qu‖².
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dfc_lightning.errors import require
from dfc_lightning.losses.link import Link
from dfc_lightning.losses.linked_loss import Label, LinkedLoss, check_link
from dfc_lightning.network.learning_rule import Control, Direct, LearningRule, Update
from dfc_lightning.passes.forward_pass import ForwardPass
from dfc_lightning.passes.plasticity import PLASTICITIES, Plasticity
from dfc_lightning.settling.controller import PIController
from dfc_lightning.settling.link import settle_linked
from dfc_lightning.settling.settled import Settled, Settling
from dfc_lightning.settling.steady_state import SteadyState
from dfc_lightning.settling.strong_simulation import Draw, Run, StrongSimulation, draws
from dfc_lightning.settling.target import ClampedTarget
from dfc_lightning.settling.update_sums import by_sample


def _controller() -> PIController:
    return PIController(alpha=1e-3, k_p=2.0, leak="control")


def _noisy() -> StrongSimulation:
    return StrongSimulation(sigma=0.004, sigma_output=0.03, tau_noise=0.07)


@dataclass(frozen=True)
class StrongDFC(LearningRule):
    """Strong-DFC in a single phase: forward and feedback weights learn at once, from one noisy simulation.

    ΔW_i ∝ (φ(v_i) − φ(v_i^ff)) r_{i−1}ᵀ, averaged over time, and ΔQ_i ∝ −(1 + τ_v/τ_ε)^{L−i} v_i^fb ũᵀ / σ_i², with ũ
    the high-passed control; σ_i is taken as 0.01 at least. In gradient units, λ = 1. The feedback weights descend what
    the rule has for them by ``DFCStrategy(feedback=FeedbackLearning(…))``.

    Args:
        settling: the simulation; it has to have noise, and coloured noise if its slow part is not to teach.
        controller: the controller.
        link: the output's own nonlinearity g, or the loss by it and its scale; None to have it found by the strategy.
        tau_f: time constant τ_f / τ_u of the low-pass that the high-passed control is without, at least ``dt``.
        layer_gain: what stands for 1 + τ_v/τ_ε above; None for that.
        plasticity: the postsynaptic factor.
    """

    feedback: ClassVar[Direct] = Direct(init="xavier_normal")

    settling: StrongSimulation = field(default_factory=_noisy)
    controller: PIController = field(default_factory=_controller)
    link: Link | LinkedLoss | None = None
    tau_f: float = 0.5
    layer_gain: float | None = None
    plasticity: Plasticity = "rate_difference"

    def __post_init__(self) -> None:
        _check(self.link, self.plasticity)
        remedy = "feedback weights learn from noise; give settling.sigma a value above zero, or use TwoPhaseStrongDFC"
        require(self.settling.sigma > 0, "sigma", self.settling.sigma, remedy)
        remedy = f"the step dt={self.settling.dt} is larger than this time constant; lower dt or raise it"
        require(self.settling.dt <= self.tau_f, "tau_f", self.tau_f, remedy)

    @property
    def control(self) -> Control:
        """Controller, target and plasticity."""
        return Control(self.controller, ClampedTarget(), self.plasticity)

    def teach(self, forward: ForwardPass, loss_grad: Tensor) -> Update:
        """The update for a batch; see :class:`LearningRule`."""
        label = forward.label(loss_grad, self.link)
        run = self._run(forward, label, draws(forward, loss_grad))
        counted = run.settled.counted(drop_unconverged=False)
        settled, share = run.settled, 1.0
        if not counted.all():  # once more without the diverged, and with the same noise
            share = int(counted.sum()) / forward.batch_size
            if not share:
                return _nothing(forward, settled)
            run = self._run(forward.samples(counted), label.samples(counted), draws(forward, loss_grad, counted))
        assert run.taught is not None and run.feedback is not None
        taught = [[t * -share for t in each] for each in run.taught]
        return Update(taught, [q * share for q in run.feedback], settled)

    def _run(self, forward: ForwardPass, label: Label, draw: Draw) -> Run:
        return self.settling.run(
            forward,
            label.offset,
            label.link,
            self.controller,
            draw,
            update=self.plasticity,
            filtered=self.settling.dt / self.tau_f,
            layer_gain=self.layer_gain,
            weight=label.weight,
        )


@dataclass(frozen=True)
class TwoPhaseStrongDFC(LearningRule):
    """Strong-DFC in two phases: forward weights learn from the last state, without noise; feedback weights in passes.

    ΔW_i ∝ (φ(v_i) − φ(v_i^ff)) r_{i−1}ᵀ as in :class:`DFC`, in gradient units with λ = 1. The feedback weights learn
    by ``DFCStrategy(feedback=FeedbackLearning(method=StrongSampled(…)))``, or by any other method.

    The authors stop after a time T of half of τ_u, ``StrongSimulation()`` with α near zero and k_p = 2, far from the
    steady state: e has hardly changed since the network followed the first control, so that u is about (k_p + T) e.
    That is the steady state of a leak of 1/(k_p + T) on the control, which is solved for, by default.

    Args:
        settling: ``SteadyState``, or ``StrongSimulation`` for the way there.
        controller: the controller; None for that leak if ``settling`` solves, and for the authors' if it simulates.
        link: the output's own nonlinearity g, or the loss by it and its scale; None to have it found by the strategy.
        plasticity: the postsynaptic factor.
    """

    feedback: ClassVar[Direct] = Direct(init="xavier_normal", learned=True)

    settling: Settling = field(default_factory=SteadyState)
    controller: PIController | None = None
    link: Link | LinkedLoss | None = None
    plasticity: Plasticity = "rate_difference"

    def __post_init__(self) -> None:
        _check(self.link, self.plasticity)
        remedy = "give SteadyState() or StrongSimulation(...); the others do not know the output's own nonlinearity"
        known = isinstance(self.settling, (SteadyState, StrongSimulation))
        require(known, "settling", type(self.settling).__name__, remedy)
        sigma = self.settling.sigma if isinstance(self.settling, StrongSimulation) else 0.0
        remedy = "the forward phase of two has no noise; leave it at zero, or use StrongDFC"
        require(sigma == 0, "sigma", sigma, remedy)

    @property
    def control(self) -> Control:
        """Controller, target and plasticity."""
        controller = self.controller
        if controller is None:
            simulated = isinstance(self.settling, StrongSimulation)
            controller = _controller() if simulated else PIController(alpha=0.4, leak="control")
        return Control(controller, ClampedTarget(), self.plasticity)

    def teach(self, forward: ForwardPass, loss_grad: Tensor) -> Update:
        """The update for a batch; see :class:`LearningRule`."""
        label = forward.label(loss_grad, self.link)
        controller = self.control.controller
        assert controller is not None
        if isinstance(self.settling, StrongSimulation):
            settled = self.settling.run(forward, label.offset, label.link, controller).settled
        else:
            settled = settle_linked(self.settling, forward, label.offset, controller, label.link)
        counted = settled.counted(drop_unconverged=False)
        response = settled.response_of(counted)
        signals = by_sample(forward.postsynaptic(response, self.plasticity), label.weight)
        return Update(forward.gradients(signals, forward.heard(response), scale=-1.0), settled=settled)


def _check(link: Link | LinkedLoss | None, plasticity: Plasticity) -> None:
    check_link(link)
    require(plasticity in PLASTICITIES, "plasticity", plasticity, f"choose one of {PLASTICITIES}")


def _nothing(forward: ForwardPass, settled: Settled) -> Update:
    """No update at all."""
    none = forward.gradients([torch.zeros_like(v) for v in forward.v])
    return Update(none, [torch.zeros_like(q) for q in forward.feedback], settled)
