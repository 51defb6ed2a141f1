"""The conditions of the paper's theory, measured on what a training step has seen."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from dfc_lightning.metrics import (
    ConditionOne,
    ConditionTwo,
    ControlEffort,
    ControlRatio,
    FeedbackAngle,
    StabilityEigenvalue,
    control_matrix,
    instantaneous_matrix,
)
from dfc_lightning.network.learning_rule import LearningRule
from dfc_lightning.passes.forward_pass import ForwardPass
from dfc_lightning.settling.settled import Settled


class Conditions:
    """Metrics of a rule's conditions, each with sums that are exact over batches and ranks.

    Condition 1 and the matrix of the whole network are for chains: where weights are shared between positions, the
    norm of what a layer hears does not weigh its units.

    Args:
        rule: the rule; one without feedback weights or a controller leaves out what is said of these.
        forward: a pass of the network.
        dense: whether to measure those that form n_L × n_L matrices of each sample.
        damping: γ of the pseudoinverse that the feedback weights are compared with.
        tau_ratio: τ_v / τ_u of the full network-and-controller matrix; None to leave that out.
    """

    def __init__(
        self,
        rule: LearningRule,
        forward: ForwardPass,
        dense: bool = True,
        damping: float = 0.1,
        tau_ratio: float | None = None,
    ) -> None:
        self.control = rule.control
        self.controller = None if rule.feedback is None else self.control.controller
        self.tau_ratio = tau_ratio
        self.metrics: dict[str, Metric] = {"condition_1": ConditionOne()} if forward.dense else {}
        if dense and rule.feedback is not None:
            self.metrics["condition_2"] = ConditionTwo()
            self.metrics["feedback_to_transpose"] = FeedbackAngle("transpose")
            self.metrics["feedback_to_pseudoinverse"] = FeedbackAngle("pseudoinverse", damping)
        if dense and self.controller is not None:
            self.metrics["condition_3"] = StabilityEigenvalue()
        if self.controller is not None:
            self.metrics["control_ratio"] = ControlRatio(forward.depth)
            self.metrics["control_effort"] = ControlEffort(forward.depth)
            if tau_ratio is not None:
                self.metrics["stability"] = StabilityEigenvalue()

    def to(self, device: torch.device) -> None:
        """Keep the sums there."""
        for metric in self.metrics.values():
            metric.to(device)

    def update(self, forward: ForwardPass, loss_grad: Tensor, settled: Settled | None) -> None:
        """Count a batch in.

        Args:
            forward: the pass.
            loss_grad: ∂ℓ_b/∂r_L, (B, n_L).
            settled: the controlled network, where the rule has one.
        """
        metrics = self.metrics
        if self.control.relative and self.controller is not None:
            forward = forward.in_unit(self.control.target.offset(loss_grad))
        if "condition_1" in metrics:
            metrics["condition_1"].update(forward.presynaptic)
        if "condition_2" in metrics:
            jacobian, feedback = torch.cat(forward.jacobians(), dim=2), forward.joint_feedback()
            for name in ("condition_2", "feedback_to_transpose", "feedback_to_pseudoinverse"):
                metrics[name].update(feedback, jacobian)
            if self.controller is not None:
                matrix = instantaneous_matrix(feedback, jacobian, self.controller.steady_leakage)
                metrics["condition_3"].update(matrix)
        if self.controller is not None and self.tau_ratio is not None:
            metrics["stability"].update(control_matrix(forward, self.controller, self.tau_ratio))
        if "control_ratio" in metrics and settled is not None:
            apical, basal = _drives(forward, settled)
            metrics["control_ratio"].update(apical, basal)
            metrics["control_effort"].update(apical)

    def compute(self) -> dict[str, Tensor]:
        """The values over all batches and ranks since the last call."""
        values: dict[str, Tensor] = {}
        for name, metric in self.metrics.items():
            value = metric.compute()
            values |= {f"{name}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
            metric.reset()
        return values


def _drives(forward: ForwardPass, settled: Settled) -> tuple[list[Tensor], list[Tensor]]:
    """a_i and W_i r_{i−1} of the samples that have not diverged; W r of a normalisation lacks its shift."""
    sound = settled.counted(drop_unconverged=False)
    basal = forward.basal_drive(settled.response)
    return [a[sound] for a in settled.response.driven], [w[sound] for w in basal]
