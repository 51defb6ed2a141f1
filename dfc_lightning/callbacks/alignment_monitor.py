from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from dfc_lightning.callbacks.conditions import Conditions
from dfc_lightning.callbacks.controlled_trainer import controlled
from dfc_lightning.errors import ControlError, require
from dfc_lightning.metrics import gauss_newton_update, update_angle
from dfc_lightning.network.learning_rule import LearningRule, Update
from dfc_lightning.passes.dense import as_dense
from dfc_lightning.passes.forward_pass import ForwardPass
from dfc_lightning.precision import full_precision
from dfc_lightning.recording.points import ControlPoint
from dfc_lightning.rules import DFC, Backprop, MinimumNorm
from dfc_lightning.settling import Linearized
from dfc_lightning.settling.controller import PIController
from dfc_lightning.settling.inverse import DENSE_UP_TO
from dfc_lightning.training.logs import log

REFERENCES = ("backprop", "gauss_newton", "minimum_norm", "ssa")
CHEAP = ("backprop", "ssa")
"""Those of them that form no n_L × n_L matrix of each sample where outputs are wide."""

Teach = Callable[[ForwardPass, Tensor], Update]


class AlignmentMonitor(Callback):
    """Logs how the rule's update relates to others, and how far the conditions of the theory are met.

    Every so many optimizer steps, from the activity and the loss gradient of the step itself: no second
    ``training_step``, and nothing about the training changes. What is compared are updates as they reach the
    optimizer, before clipping: summed over accumulated batches and averaged over processes.

    Logged, to all loggers of the trainer, with L the number of layers, or of control points:

    - ``alignment/<reference>/layer_1`` … ``layer_L`` and ``total``: angle in degrees to the update of a reference;
    - ``alignment/condition_1``: spread of the norms of the layers' inputs;
    - ``alignment/condition_2``: share of Q in the row space of J;
    - ``alignment/feedback_to_transpose``, ``alignment/feedback_to_pseudoinverse``: angle of Q to Jᵀ, Jᵀ(JJᵀ + γI)⁻¹;
    - ``alignment/condition_3``: largest real part of the eigenvalues of −(JQ + α̃I), below zero where stable;
    - ``alignment/stability``: the same of the full network-and-controller matrix, if ``tau_ratio`` is given;
    - ``alignment/control_ratio/layer_1`` … ``layer_L`` and ``total``: ‖Qu‖ / ‖Wr‖;
    - ``alignment/control_effort/layer_1`` … ``layer_L`` and ``total``: ‖Qu‖², the mean over samples: the H that
      Strong-DFC minimises.

    Of networks that are no chains of linear layers, the Gauss-Newton update, ``condition_1`` and ``stability`` are left
    out, and J and Q are taken at the units that feedback reaches: all of a layer's, or its channels. Layered feedback
    counts as the Q that it is to each sample. Of rules without feedback weights, all that is said of Q is left out,
    DFC-SSA included; of those without a controller, ``condition_3``, ``stability``, ``control_ratio`` and
    ``control_effort``. Where α is relative to the size of JQ, γ of the minimum-norm update is so too.

    Args:
        every_n_steps: number of optimizer steps from one look to the next.
        references: which of ``"backprop"``, ``"gauss_newton"`` (for each sample alone, damped), ``"minimum_norm"``
            (what DFC computes with ideal feedback) and ``"ssa"`` (DFC-SSA, in closed form) to compare with; None for
            all that the network and the rule have, but without the second and third, which factorise an n_L × n_L
            matrix a sample, where the network has more than ``DENSE_UP_TO`` outputs.
        damping: γ of the Gauss-Newton and minimum-norm updates, and of the pseudoinverse; the paper has 0.1.
        conditions: whether to log the conditions beside the angles; None for those that are cheap: beyond
            ``DENSE_UP_TO`` outputs only ``condition_1``, ``control_ratio`` and ``control_effort``.
        tau_ratio: τ_v / τ_u for ``alignment/stability``, which takes the eigenvalues of a matrix as wide as the
            whole network for each sample: for small networks. None to leave it out.

    Example:
        >>> import lightning as L
        >>> from dfc_lightning import DFCStrategy
        >>> trainer = L.Trainer(
        ...     max_epochs=1,
        ...     strategy=DFCStrategy(),
        ...     callbacks=[AlignmentMonitor(every_n_steps=50)],
        ...     logger=False,
        ...     enable_checkpointing=False,
        ... )
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        references: Sequence[str] | None = None,
        damping: float = 0.1,
        conditions: bool | None = None,
        tau_ratio: float | None = None,
    ) -> None:
        require(every_n_steps >= 1, "every_n_steps", every_n_steps, "look every step, 1, or less often")
        require(set(references or ()) <= set(REFERENCES), "references", references, f"choose of {REFERENCES}")
        require(damping >= 0, "damping", damping, "give a damping of zero or more")
        require(tau_ratio is None or tau_ratio > 0, "tau_ratio", tau_ratio, "give a ratio above zero, e.g. 0.2")
        self.every_n_steps, self.references, self.damping = every_n_steps, references, damping
        self.with_conditions, self.tau_ratio = conditions, tau_ratio
        self._updates: Tensor | None = None  # the rule's and the references', summed over accumulated batches
        self._names: Sequence[str] = ()
        self._sizes: list[int] = []
        self._conditions: Conditions | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            controlled(trainer, self)
        self._updates = self._conditions = None

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy = controlled(trainer, self)
        lesson, network = strategy.lesson, strategy.network
        if lesson is None or network is None or not lesson.taught:
            return
        forward, grad, rule = lesson.forward, lesson.loss_grad, strategy.rule
        assert forward is not None and grad is not None
        self._check(forward, rule)
        if (trainer.global_step + 1) % self.every_n_steps:
            return
        with (
            torch.no_grad(),
            full_precision(grad.device),
            _private_generators(grad.device),
            forward.holding_jacobians(),
        ):
            self._names = self._possible(forward, rule) if self.references is None else self.references
            teachers: list[Teach] = [rule.teach, *(self._reference(name, rule) for name in self._names)]
            layers = [_by_layer(network.points, teach(forward, grad)) for teach in teachers]
            self._sizes = [len(layer) for layer in layers[0]]
            updates = torch.stack([torch.cat(each) for each in layers])
            if lesson.loss_reduction == "sum":
                updates *= forward.batch_size
            self._updates = updates if self._updates is None else self._updates + updates
            if self.with_conditions is not False:
                if self._conditions is None:
                    dense = forward.outputs <= DENSE_UP_TO or self.with_conditions is True
                    self._conditions = Conditions(rule, forward, dense, self.damping, self.tau_ratio)
                    self._conditions.to(grad.device)
                self._conditions.update(forward, grad, lesson.settled)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._updates is None:
            return
        ours, *others = trainer.strategy.reduce(self._updates)
        self._updates = None
        values: dict[str, Tensor] = {}
        for name, other in zip(self._names, others):
            angles = update_angle(ours.split(self._sizes), other.split(self._sizes))
            values |= {f"{name}/{layer}": angle for layer, angle in angles.items()}
        if self._conditions is not None:
            values |= self._conditions.compute()
        log(trainer, {f"alignment/{name}": value for name, value in values.items()}, trainer.global_step + 1)

    def _check(self, forward: ForwardPass, rule: LearningRule) -> None:
        """Complain of what is asked for and this network or this rule does not have."""
        asked = self.references or ()
        if "gauss_newton" in asked:
            others = tuple(name for name in REFERENCES if name != "gauss_newton")
            as_dense(forward, f"references={asked}: the Gauss-Newton update", f"Choose of {others}.")
        if self.tau_ratio is not None:
            as_dense(
                forward,
                f"tau_ratio={self.tau_ratio}: the matrix of network and controller",
                "Leave tau_ratio=None; alignment/condition_3 tells whether a slow controller is stable.",
            )
        if "ssa" in asked and rule.feedback is None:
            raise ControlError(
                f"references={asked}: the update of DFC-SSA is made by feedback weights, of which "
                f"{type(rule).__name__} has none. Choose of {tuple(name for name in REFERENCES if name != 'ssa')}, or "
                "train with a rule that has them, such as DFC()."
            )

    def _possible(self, forward: ForwardPass, rule: LearningRule) -> list[str]:
        """The references that this network and this rule have, and that are cheap."""
        left_out = set() if forward.dense else {"gauss_newton"}
        if rule.feedback is None:
            left_out.add("ssa")
        names = REFERENCES if forward.outputs <= DENSE_UP_TO else CHEAP
        return [name for name in names if name not in left_out]

    def _reference(self, name: str, rule: LearningRule) -> Teach:
        """The update to compare with, by the rule's own target stepsize, controller and plasticity if it has them."""
        if name == "backprop":
            return Backprop().teach
        if name == "gauss_newton":
            return lambda forward, grad: gauss_newton_update(forward, grad, self.damping)
        control = rule.control
        stepsize, plasticity = control.target.stepsize, control.plasticity
        if name == "minimum_norm":
            return MinimumNorm(self.damping, stepsize, plasticity, relative=control.relative).teach
        controller, relative = control.controller or PIController(), control.relative
        kept: dict[str, Any] = dict(target_stepsize=stepsize, plasticity=plasticity, relative=relative)
        return DFC(Linearized(), controller, **kept).teach


def _by_layer(points: Sequence[ControlPoint], update: Update) -> list[Tensor]:
    """What each layer's trainable parameters would be given, one vector a layer."""
    return [
        torch.cat([t.flatten() for p, t in zip(point.parameters, pair) if p.requires_grad])
        for point, pair in zip(points, update.gradients)
    ]


def _private_generators(device: torch.device) -> Any:
    """Leave torch's generators as they were, should a rule draw from them."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
