"""Deep Feedback Control (Meulemans et al. 2021): the controlled change of activity is the learning signal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dfc_lightning.errors import require
from dfc_lightning.network.learning_rule import Control, Direct, Layerwise, LearningRule, Update
from dfc_lightning.passes.forward_pass import ForwardPass, joint_norm, scaled
from dfc_lightning.passes.plasticity import PLASTICITIES, Plasticity
from dfc_lightning.settling.controller import PIController
from dfc_lightning.settling.settled import Settling, Simulation
from dfc_lightning.settling.steady_state import SteadyState
from dfc_lightning.settling.target import ClampedTarget, NudgedTarget
from dfc_lightning.settling.time_step import TimeStep
from dfc_lightning.settling.trajectory import Trajectory


@dataclass(frozen=True)
class DFC(LearningRule):
    """ΔW_i ∝ (φ(v_i) − φ(v_i^ff)) r_{i−1}ᵀ with the network under control, Eq. (5).

    DFC, DFC-SS and DFC-SSA of the paper are this rule with different settling: ``Euler`` and ``integrate=True``,
    ``SteadyState``, and ``Linearized``. In gradient units: divided by −λB.

    Args:
        settling: how the controlled network reaches its state.
        controller: the controller.
        target_stepsize: λ of Eq. (3), for the loss of one sample.
        clamped: drive the output the whole way, λ = 1, instead.
        integrate: average the update over the simulated time (DFC) instead of taking the last state (DFC-SS).
        plasticity: postsynaptic factor: ``"rate_difference"`` (Eq. 5), ``"voltage_difference"`` or ``"derivative"``.
        relative: give α and k_p in units of the size of JQ, ‖JQ δ_L‖ / ‖δ_L‖ in each sample, and let what is driven
            teach by as much, over all voltages of a sample, as Q δ_L itself: what α → ∞ would teach, and with Q = Jᵀ
            backprop. Layered feedback then teaches by its apical voltages, the statistics of batch normalisations
            following their batch as in backprop: held, errors would also drive what a normalisation takes out again.
            Without, α is in the units of JQ, as the paper has it, and the update fades as JQ grows.
        unconverged: ``"keep"`` samples that have not settled, or ``"drop"`` them: they then give no update, while
            the mean is still over all B. Diverged samples never give one.
    """

    feedback: ClassVar[Direct | Layerwise] = Direct(learned=True)

    settling: Settling = field(default_factory=SteadyState)
    controller: PIController = field(default_factory=PIController)
    target_stepsize: float = 0.1
    clamped: bool = False
    integrate: bool = False
    plasticity: Plasticity = "rate_difference"
    relative: bool = False
    unconverged: Literal["keep", "drop"] = "keep"

    def __post_init__(self) -> None:
        NudgedTarget(self.target_stepsize)  # checks it
        require(self.plasticity in PLASTICITIES, "plasticity", self.plasticity, f"choose one of {PLASTICITIES}")
        require(self.unconverged in ("keep", "drop"), "unconverged", self.unconverged, 'choose "keep" or "drop"')
        require(
            not self.integrate or isinstance(self.settling, Simulation),
            "integrate",
            self.integrate,
            f"{type(self.settling).__name__} has no time to average over; use settling=Euler(...)",
        )
        remedy = "an update averaged over time is in the units of JQ; give relative=False, or integrate=False"
        require(not (self.relative and self.integrate), "relative", self.relative, remedy)
        remedy = f"{type(self.settling).__name__} knows feedback straight from the output alone; use SteadyState()"
        fit = not (self.relative or isinstance(self.feedback, Layerwise)) or not isinstance(self.settling, Trajectory)
        require(fit, "settling", self.settling, remedy)
        if isinstance(self.settling, TimeStep):  # u_int ← (1 − α dt) u_int + …
            dt, alpha = self.settling.dt, self.controller.alpha
            remedy = f"the leak alone makes steps of dt={dt} unstable; give a leakage below {2 / dt:g}, or a lower dt"
            require(alpha * dt < 2, "alpha", alpha, remedy)

    @property
    def target(self) -> NudgedTarget:
        """The output target."""
        return ClampedTarget() if self.clamped else NudgedTarget(self.target_stepsize)

    @property
    def control(self) -> Control:
        """Controller, target and plasticity."""
        return Control(self.controller, self.target, self.plasticity, self.relative)

    def teach(self, forward: ForwardPass, loss_grad: Tensor) -> Update:
        """The update for a batch; see :class:`LearningRule`."""
        offset = self.target.offset(loss_grad)
        scale, drop = -1 / self.target.stepsize, self.unconverged == "drop"
        if isinstance(self.settling, Simulation) and self.integrate:
            settled, taught = self.settling.settle_and_integrate(
                forward, offset, self.controller, self.plasticity, drop
            )
            return Update([[t * scale for t in each] for each in taught], settled=settled)
        relative = forward.in_unit(offset) if self.relative else forward
        settled = self.settling.settle(relative, offset, self.controller)
        counted = settled.counted(drop)
        response = settled.response_of(counted)
        if forward.layered and self.plasticity == "voltage_difference":
            signals = list(response.driven)  # which are zero where a unit loses in pooling
        else:
            signals = forward.postsynaptic(response, self.plasticity)
        if (unit := relative.unit) is not None:
            sizes = relative_size(unit.drive, response.driven)
            if forward.layered and forward.batched and self.plasticity == "voltage_difference":
                control = torch.where(counted.unsqueeze(1), settled.control * sizes / unit.size, 0.0)
                signals = forward.pull(control, through=forward.feedback, live=True)
            else:
                signals = scaled(signals, sizes)
        return Update(forward.gradients(signals, forward.heard(response), scale), settled=settled)


def relative_size(wanted: Tensor, driven: Sequence[Tensor]) -> Tensor:
    """By what to multiply what is driven for a sample's to have the norm wanted, both (B, 1); 1 where nothing is."""
    norm = joint_norm(driven)
    return torch.where(norm > 0, wanted / norm, 1.0)
