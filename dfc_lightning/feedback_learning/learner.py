"""Feedback learning with its schedule and its optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from dfc_lightning.errors import require
from dfc_lightning.feedback_learning.expected import Expected
from dfc_lightning.feedback_learning.method import FeedbackMethod, Noise
from dfc_lightning.feedback_learning.mirror import ExpectedMirror
from dfc_lightning.network.controlled_network import ControlledNetwork
from dfc_lightning.passes.chance import Chance
from dfc_lightning.passes.forward_pass import ForwardPass
from dfc_lightning.precision import full_precision


@dataclass(frozen=True)
class FeedbackLearning:
    """When and how the feedback weights Q_i or B_i learn.

    They have an optimizer of their own with L2 decay, one for the initial passes and a fresh one after these.

    Args:
        method: how the gradient is had.
        initial_passes: passes over the training data before the first epoch.
        passes_per_epoch: passes over the training data at the start of every epoch.
        every_n_batches: a feedback step on the same batch after every n-th training step; 0 for none.
        max_batches: batches of a pass at most; None for all that an epoch has, or 500 where the data have no length.
        every_nth_sample: learn from every n-th sample of a batch only; the gradient varies little over samples.
        initial_lr: learning rate in the initial passes; None for ``lr``.
        lr: learning rate after them.
        optimizer: ``"adam"`` or plain ``"sgd"``.
        betas: Adam's decay rates.
        eps: Adam's epsilon.
        weight_decay: L2 decay, added to the gradient.
        clip_norm: bound on the joint norm of all feedback gradients; None for none.
        clip_each: bound the norm of each feedback gradient instead.
        train_output: let the feedback weights of the points that are the output learn too; else they stay as they
            are, Q_L the identity.
    """

    method: FeedbackMethod = field(default_factory=Expected)
    initial_passes: int = 1
    passes_per_epoch: int = 1
    every_n_batches: int = 0
    max_batches: int | None = None
    every_nth_sample: int = 1
    initial_lr: float | None = None
    lr: float = 3e-3
    optimizer: Literal["adam", "sgd"] = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    clip_each: bool = False
    train_output: bool = True

    def __post_init__(self) -> None:
        for name in ("initial_passes", "passes_per_epoch", "every_n_batches"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "give zero or more")
        most = self.max_batches
        require(most is None or most >= 1, "max_batches", most, "give one or more, or None for no bound")
        require(self.every_nth_sample >= 1, "every_nth_sample", self.every_nth_sample, "take every sample, 1, or fewer")
        require(self.optimizer in ("adam", "sgd"), "optimizer", self.optimizer, 'choose "adam" or "sgd"')
        require(self.lr > 0, "lr", self.lr, "give a learning rate above zero")
        require(
            self.initial_lr is None or self.initial_lr > 0,
            "initial_lr",
            self.initial_lr,
            "give one above zero",
        )
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "give zero or more")
        require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", self.clip_norm, "give one above zero")
        require(
            not (self.method.needs_loss and self.every_n_batches),
            "every_n_batches",
            self.every_n_batches,
            f"{type(self.method).__name__} needs the loss, which is not known after a step; use passes_per_epoch",
        )

    @property
    def has_steps(self) -> bool:
        """Whether there are any feedback learning steps by it."""
        return bool(self.initial_passes or self.passes_per_epoch or self.every_n_batches)


EVERY_BATCH = FeedbackLearning(Expected(gated=True), passes_per_epoch=0, every_n_batches=1, every_nth_sample=8)
"""One pass over the data to begin with, then a step on an eighth of the samples after every training step.

It follows the forward weights more closely than a pass every epoch, at less cost: what the strategies do by default."""


MIRRORED = FeedbackLearning(
    ExpectedMirror(),
    passes_per_epoch=0,
    max_batches=100,
    lr=0.1,
    optimizer="sgd",
    weight_decay=0.0,
    clip_norm=None,
)
"""A mirror phase to begin with, after which layerwise feedback weights track what the optimizer does: for B_i the
default."""


@dataclass(frozen=True)
class Ranks:
    """The processes that learn together: of n, rank r has every n-th sample of the joint batch, from the r-th on.

    Args:
        rank: this process's number.
        world_size: how many there are, n.
        mean: averages a tensor over them.
    """

    rank: int = 0
    world_size: int = 1
    mean: Callable[[Tensor], Tensor] = lambda tensor: tensor


class FeedbackLearner:
    """Takes feedback learning steps for a network; the noise of step k is drawn from a generator seeded by k.

    Args:
        network: the controlled network whose feedback weights learn.
        learning: schedule and hyperparameters.
        seed: seed of the noise.
        ranks: the processes that learn together.
    """

    def __init__(
        self, network: ControlledNetwork, learning: FeedbackLearning, seed: int = 0, ranks: Ranks | None = None
    ) -> None:
        self.network, self.learning, self.seed, self.ranks = network, learning, seed, ranks or Ranks()
        self.steps = 0
        self._optimizer: torch.optim.Optimizer | None = None
        self._initial = False

    def step(self, forward: ForwardPass, initial: bool = False, loss_grad: Tensor | None = None) -> dict[str, Tensor]:
        """One feedback learning step on a feedforward pass.

        Args:
            forward: the feedforward pass, from :meth:`ControlledNetwork.observe`.
            initial: whether this step belongs to the initial passes.
            loss_grad: ∂ℓ_b/∂r_L of each sample's own loss, (B, n_L), for methods that need the loss.

        Returns:
            What :meth:`descend` does.
        """
        with full_precision(forward.output.device):
            gradients, shares = self.gradients(self.network.bound(forward), loss_grad)
        return self.descend(gradients, initial, shares)

    def descend(
        self, gradients: Sequence[Tensor], initial: bool = False, shares: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """One step of the optimizer down gradients of the feedback weights.

        Args:
            gradients: this process's, one a point, whose mean over the processes is that of the joint batch. Clipping
                may overwrite them.
            initial: whether this step belongs to the initial passes.
            shares: the share of the samples that a gradient is a sum over, to divide it by; see
                :meth:`FeedbackMethod.shares`.

        Returns:
            ``norm``, the norm of all feedback weights, and ``grad_norm``, that of their gradient, both scalars.
        """
        count = len(gradients)
        gradients = self._averaged([*gradients, *(shares or ())])
        if shares is not None:  # where no sample counts, the sum is zero
            gradients = [g / s.masked_fill(s == 0, 1.0) for g, s in zip(gradients[:count], gradients[count:])]
        for q, gradient in zip(self.network.feedback, gradients):
            q.grad = gradient
        bound = torch.inf if self.learning.clip_norm is None else self.learning.clip_norm
        learned = self._learned()
        norm = torch.nn.utils.clip_grad_norm_(learned, torch.inf if self.learning.clip_each else bound)
        for q in learned if self.learning.clip_each else ():
            torch.nn.utils.clip_grad_norm_(q, bound)
        if torch.isfinite(norm):
            self._optimizer_for(initial).step()
        for q in self.network.feedback:
            q.grad = None
        self.steps += 1
        size = torch.stack([q.detach().square().sum() for q in self.network.feedback]).sum().sqrt()
        return {"norm": size, "grad_norm": norm}

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state and the number of steps taken; the weights are the network's."""
        optimizer = None if self._optimizer is None else self._optimizer.state_dict()
        return {"steps": self.steps, "initial": self._initial, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state saved by :meth:`state_dict`, after the network's feedback weights are loaded.

        Raises:
            ValueError: it is of other feedback weights.
        """
        self.steps, self._optimizer = state["steps"], None
        if state["optimizer"] is not None:
            optimizer = self._optimizer_for(state["initial"])
            optimizer.load_state_dict(state["optimizer"])
            for q, moments in optimizer.state.items():
                for moment in (moments[name] for name in ("exp_avg", "exp_avg_sq") if name in moments):
                    if moment.shape != q.shape:
                        shapes = tuple(moment.shape), tuple(q.shape)
                        raise ValueError(
                            "The optimizer state has the shape {} for a feedback weight of {}.".format(*shapes)
                        )

    def gradients(
        self, forward: ForwardPass, loss_grad: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """This process's gradients and, of a gated method, the shares of the samples that they are sums over.

        Args:
            forward: a pass, bound to the feedback weights.
            loss_grad: see :meth:`step`.
        """
        method, world_size, weight = self.learning.method, self.ranks.world_size, 1.0
        size, noise = forward.batch_size, self._noise(forward.output)
        every = max(self.learning.every_nth_sample, method.every_nth_sample(forward))
        if every > 1:
            mine = [i for i in range(size) if (i * world_size + self.ranks.rank) % every == 0]
            if not mine:
                shares = method.shares(forward)
                nothing = None if shares is None else [torch.zeros_like(s) for s in shares]
                return [torch.zeros_like(q) for q in forward.feedback], nothing
            some = torch.tensor(mine, device=forward.output.device)
            forward, loss_grad = forward.samples(some), None if loss_grad is None else loss_grad[some]
            weight = len(mine) * world_size / math.ceil(size * world_size / every)
        if loss_grad is not None:
            method = method.towards(loss_grad)
        gradients, shares = method.draw(forward, noise), method.shares(forward)
        return [g * weight for g in gradients], None if shares is None else [s * weight for s in shares]

    def _noise(self, output: Tensor) -> Noise:
        """Draws for the samples of ``output``, (B, n_L), out of those for the joint batch."""
        drawing = Chance(self.seed, self.steps, self.ranks.rank, self.ranks.world_size, output.device).drawing()
        # In float32 they cost a sixth on a CPU, and noise needs no more digits.
        return lambda shape: drawing.of_samples(shape).to(output.dtype)

    def _averaged(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The means over the processes, by one reduction."""
        if self.ranks.world_size == 1:
            return list(tensors)
        flat = self.ranks.mean(torch.cat([t.flatten() for t in tensors]))
        return [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors)]

    def _learned(self) -> list[torch.nn.Parameter]:
        fixed: Sequence[int] = () if self.learning.train_output else self.network.outputs_at
        return [q for i, q in enumerate(self.network.feedback) if i not in fixed]

    def _optimizer_for(self, initial: bool) -> torch.optim.Optimizer:
        learned, before = self._learned(), self._optimizer
        had = [] if before is None else before.param_groups[0]["params"]
        if before is None or self._initial != initial or list(map(id, had)) != list(map(id, learned)):
            settings = self.learning
            lr = settings.initial_lr if initial and settings.initial_lr is not None else settings.lr
            if settings.optimizer == "sgd":
                self._optimizer = torch.optim.SGD(learned, lr, weight_decay=settings.weight_decay)
            else:
                self._optimizer = torch.optim.Adam(learned, lr, settings.betas, settings.eps, settings.weight_decay)
            if before is not None and self._initial == initial:  # other layers learn now: the rest go on as they were
                self._optimizer.state.update({q: before.state[q] for q in learned if before.state.get(q)})
            self._initial = initial
            return self._optimizer
        return before
