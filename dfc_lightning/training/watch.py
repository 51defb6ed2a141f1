"""A watch on learning itself: one sentence, the first time, for each way in which it fails."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from dfc_lightning.errors import ControlError
from dfc_lightning.network.gate import Lesson

Watch = Literal["warn", "stop", "off"]
WATCHES = ("warn", "stop", "off")

EVERY = 20
"""Steps from one look of the host at the learning to the next."""

LOOKS = {"loss": 2, "no number": 2}
"""Looks in a row that must agree before anything is said; of what is not named here 3."""

UNSETTLED, FAR = 0.5, 0.25
"""Share of samples that have missed their steady state by more than ``FAR`` of their target."""

DIVERGED = 0.1
"""Share of samples that have gone astray, and teach nothing."""

REVERSED = 0.25
"""Share of samples whose control points away from its own target, u · δ_L < 0: JQ has no sign there."""

OVERDRIVEN = 10.0
"""‖Q_L u‖ / ‖δ_L‖, the output layer's teaching signal by what its own error is; up to 1 with ideal feedback."""

LAGGING = 0.2
"""How well learned feedback follows the network, from 0 to 1; see :func:`alignment`."""

SIZE = 10.0
"""‖update‖ / ‖backprop's‖, or the reverse."""

FEEDBACK_GROWTH = 100.0
"""‖Q‖ by what it was at the first look."""

LOSS_GROWTH = 2.0
"""Rise of the loss over its lowest, both means between two looks, in units of the first such mean."""


@dataclass
class LearningWatch:
    """Looks at every ``EVERY``-th step, and says once a run of each kind what fails, why, and what to do.

    Args:
        stop: raise instead of warning.
        reduce: mean of a tensor over processes.
    """

    stop: bool
    reduce: Callable[[Tensor], Tensor]
    _said: set[str] = field(default_factory=set)
    _seen: dict[str, int] = field(default_factory=dict)
    _losses: list[Tensor] = field(default_factory=list)
    _first: dict[str, float] = field(default_factory=dict)
    _lowest: float = torch.inf
    _steps: int = 0

    @property
    def looks_next(self) -> bool:
        """Whether the next step is one to look at."""
        return (self._steps + 1) % EVERY == 0

    def step(
        self, lesson: Lesson, loss: Tensor | None, feedback: Sequence[Tensor], follows: Tensor | None = None
    ) -> None:
        """Take note of a training step.

        Args:
            lesson: the step's lesson.
            loss: its loss.
            feedback: the feedback weights.
            follows: how well they follow the network, if that is looked at and they are to.

        Raises:
            ControlError: learning fails and ``stop`` is set.
        """
        self._steps += 1
        if loss is not None:
            self._losses.append(loss.detach())
        if self._steps % EVERY:
            return
        with torch.no_grad():
            measured = {**_of_settling(lesson), **self._of_loss()}
            if len(feedback):
                measured["feedback"] = torch.stack([q.detach().double().norm() for q in feedback]).norm()
            if follows is not None:
                measured["follows"] = follows
            if lesson.sizes is not None:
                ours, backprops = (each.double().norm() for each in lesson.sizes)
                measured["size"] = ours / backprops.clamp_min(1e-30)
            if not measured:
                return
            values = torch.stack([v.double() for v in measured.values()])
            found = dict(zip(measured, self.reduce(values).tolist()))
        self._judge(found)

    def _of_loss(self) -> dict[str, Tensor]:
        if not self._losses:
            return {}
        mean = torch.stack([each.float().mean() for each in self._losses]).mean()
        self._losses = []
        return {"loss": mean}

    def _judge(self, found: dict[str, float]) -> None:
        for name, value in found.items():
            self._first.setdefault(name, value)
        for name, limit in (("unsettled", UNSETTLED), ("diverged", DIVERGED), ("reversed", REVERSED)):
            if name in found:
                self._note(name, found[name] > limit, found[name])
        if "drive" in found:
            self._note("drive", not found["drive"] <= OVERDRIVEN, found["drive"])
        if "follows" in found:
            self._note("follows", not found["follows"] >= LAGGING, found["follows"])
        if "size" in found:
            size = found["size"]
            self._note("large", not size <= SIZE, size)
            self._note("small", size < 1 / SIZE, 1 / max(size, 1e-30))
        if "feedback" in found:
            growth = found["feedback"] / max(self._first["feedback"], 1e-30)
            self._note("feedback", not growth <= FEEDBACK_GROWTH, growth)
        if "loss" in found:
            first, loss = self._first["loss"], found["loss"]
            self._note("no number", not math.isfinite(loss), loss)
            unit = max(abs(first), abs(self._lowest)) if self._lowest < torch.inf else abs(first)
            self._note("loss", loss - min(self._lowest, loss) > LOSS_GROWTH * unit, loss)
            self._lowest = min(self._lowest, loss)

    def _note(self, name: str, fails: bool, value: float) -> None:
        self._seen[name] = self._seen.get(name, 0) + 1 if fails else 0
        if name in self._said or self._seen[name] < LOOKS.get(name, 3):
            return
        self._said.add(name)
        message = _SENTENCES[name].format(value, lowest=self._lowest)
        if self.stop:
            raise ControlError(f"{message} Training was stopped, as watch='stop' says.")
        rank_zero_warn(f"{message} Training goes on; this is said once a run.")


def _of_settling(lesson: Lesson) -> dict[str, Tensor]:
    """Shares of samples, without waiting for them."""
    settled, grad, forward = lesson.settled, lesson.loss_grad, lesson.forward
    if settled is None or grad is None or forward is None:
        return {}
    sound = settled.counted(drop_unconverged=False)
    wrong = torch.linalg.vecdot(settled.control, grad) > 0  # δ_L = −λ ∂ℓ/∂r_L
    far = sound & ~settled.converged & (settled.residual > FAR)
    found = {name: mask.double().mean() for name, mask in (("unsettled", far), ("diverged", ~sound))}
    found["reversed"] = (wrong & sound).double().mean()
    if len(forward.outputs_at) == 1:
        driven = settled.response.driven[forward.outputs_at[0]].flatten(1)
        target = lesson.rule.control.target.stepsize * torch.linalg.vector_norm(grad, dim=1)
        drive = torch.linalg.vector_norm(driven, dim=1)
        found["drive"] = torch.where(sound, drive, 0.0).sum() / target.sum().clamp_min(1e-30)
    return found


_WHERE = "SettlingMonitor and AlignmentMonitor show more."
_FEEDBACK = (
    "Give a lower learning rate, a more leaky controller (DFC(controller=PIController(alpha=1.0))), feedback more "
    "passes to learn in (FeedbackLearning(initial_passes=…, passes_per_epoch=…)), or train by MinimumNorm(), which "
    f"needs no feedback weights. {_WHERE}"
)
_RELATIVE = f"DFC(relative=True) has updates of backprop's size. {_WHERE}"
_SENTENCES = {
    "unsettled": (
        "{:.0%} of the samples do not settle: under control the output stays far from its target, as the feedback "
        "weights drive it elsewhere, or the network is too far from linear on the way. "
        "Shorten the way with a smaller target_stepsize, or leave such samples out with unconverged='drop'. "
        + _FEEDBACK
    ),
    "diverged": (
        "{:.0%} of the samples diverge under control and teach nothing: JQ is unstable, as the feedback weights do not "
        "follow the network's Jacobian (Condition 3). " + _FEEDBACK
    ),
    "reversed": (
        "In {:.0%} of the samples the control points away from its target (u·δ < 0): JQ has no sign of its own, as the "
        "feedback weights do not follow the network's Jacobian (Condition 3). " + _FEEDBACK
    ),
    "drive": (
        "The update is {:.3g} times as large as the output's own error makes it with ideal feedback: JQ is nearly "
        "singular, and its inverse amplifies what the feedback weights do not reach. " + _FEEDBACK
    ),
    "follows": (
        "The feedback lags behind the network: it follows by {:.2g}, of 1 (the cosine of B and W; of Q, what it has of "
        "the row space of J beyond chance, Condition 2). The weights move faster than the feedback learns, or it has "
        "had too few steps. " + _FEEDBACK
    ),
    "large": (
        "The update is {:.3g} times as large as backprop's, and so is a step of this optimizer: a learning rate that "
        "suits backprop is too high. Divide it by that, or take Adam, which does not heed it. " + _RELATIVE
    ),
    "small": (
        "The update is {:.3g} times smaller than backprop's, and so is a step of this optimizer: a learning rate that "
        "suits backprop is too low. Multiply it by that, or take Adam, which does not heed it. " + _RELATIVE
    ),
    "feedback": (
        "The feedback weights have grown {:.3g}-fold since the run began: their learning has no hold. Give "
        "FeedbackLearning a smaller learning rate or a weight_decay, or a lower learning rate to the network. " + _WHERE
    ),
    "no number": (
        "The loss is {}: a batch, the weights or the loss's own operations are not finite. Look at the data first; "
        "Trainer(detect_anomaly=True) with rule=Backprop() names the operation. A step too long for the network does "
        "this also: give a lower learning rate. " + _WHERE
    ),
    "loss": (
        "The loss rises: {:.3g} over the last steps, {lowest:.3g} at best. The rule's updates do not descend it here, "
        "or the steps are too long. " + _FEEDBACK
    ),
}
