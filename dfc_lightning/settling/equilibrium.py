"""Where a network and its errors are at rest together: what drives each point is the error, pulled back where it is.

a_i = J_i(a)ᵀ u with the derivatives taken at the driven state, and −∂ℓ(r_L(a)) = α u. It is where the energy
½ Σ ‖a_i‖² + ℓ(r_L(a)) / α of the loss ℓ is stationary: the least control of Meulemans et al. 2022 (α → 0: the smallest
a that reaches the target), and the equilibrium of predictive coding with additive errors, if the output itself is not
driven (α = 1/β).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dfc_lightning.errors import require
from dfc_lightning.passes.forward_pass import Deviation, gain_size, joint_norm, scaled
from dfc_lightning.settling.broyden import LOOK_EVERY, StoredSteps
from dfc_lightning.settling.error_feedback import ErrorFeedback
from dfc_lightning.settling.inference import Inference
from dfc_lightning.settling.settled import Settled, share_missed

FAR_STEP = 0.5
"""The longest step of u, in units of its own size."""

JUMP = 8.0
"""How much more a must change than u, each in units of its own size, to be taken for a jump."""

REGROWTH = 1.1
"""By how much the share of a unit that has been halved grows in an iteration again."""


@dataclass(frozen=True)
class Equilibrium(Inference):
    """Solve for a = J(a)ᵀ u and −∂ℓ(r_L(a)) = α u.

    Broyden's method in u, (B, n_L), on each sample, where every iteration pulls u back at the state of the last: one
    pull and one forward pass. Where a unit's rate has a kink (ReLU, max-pooling) the equilibrium may lie on it, with
    every slope between the two sides for its derivative. There what is pulled back jumps from iteration to iteration;
    the unit then moves by a share of that, halved at every jump, which closes in on the kink.

    Args:
        rtol: residual of a sample to reach: the larger of ‖∂ℓ(r_L) + α u‖ / ‖∂ℓ(r_L⁻)‖ and the share of ‖a‖ by
            which a has moved last.
        max_iterations: limit on iterations.
    """

    rtol: float = 0.05
    max_iterations: int = 20

    def __post_init__(self) -> None:
        require(self.rtol > 0, "rtol", self.rtol, "give a residual above zero, e.g. 0.05")
        require(self.max_iterations >= 2, "max_iterations", self.max_iterations, "allow at least two iterations")

    def infer(self, feedback: ErrorFeedback, nudge: float) -> Settled:
        """The equilibrium at α = 1/β; see :class:`Inference`."""
        return self.find(feedback, 1 / nudge)[0]

    def find(self, feedback: ErrorFeedback, leakage: float, relative: bool = False) -> tuple[Settled, Tensor]:
        """The equilibrium, and ‖Jᵀ ∂ℓ(r_L⁻)‖ over all points, (B, 1), what the error drives feedforward.

        Args:
            feedback: the error, and its way back.
            leakage: α; below zero, u drives the output away from its target.
            relative: whether α is in units of the size of J Jᵀ along the error in each sample.
        """
        offset = feedback.error()
        driven = feedback.back(offset)
        gained = feedback.gained(driven)
        size = gain_size(gained, offset)
        leak = leakage * size if relative else torch.full_like(size, leakage)
        # By what is measured along the error; where the output is driven away so hard that it would run off, by α.
        share = torch.where((leak > 0) | (size + leak < 0.1 * leak), 1 / (size + leak), 1 / leak)
        inverse = StoredSteps(lambda value: value * share)
        first = inverse.step(offset)
        left = offset - share * (gained + leak * offset)
        inverse.learn(first, left - offset)
        second = inverse.step(left)
        inverse.learn(second, -left)
        search = _Search.begun(feedback, leak, share, first + second, inverse)
        whole, index = search, None
        looks = 1 if offset.device.type == "cpu" else LOOK_EVERY
        for iteration in range(1, self.max_iterations):
            active = search.residual > self.rtol
            if iteration % looks == 0:
                late = int(active.sum())
                if not late:
                    break
                if 2 * late <= len(active):  # go on with these alone
                    keep = active.nonzero().squeeze(1)
                    whole = search if index is None else whole.with_samples(index, search)
                    index = keep if index is None else index[keep]
                    search, active = search.samples(keep), active[keep]
            search.step(active)
        if index is not None:
            search = whole.with_samples(index, search)
            search.state = feedback.forward.respond(search.driven)
        settled = Settled(search.u, search.state, search.residual, search.residual <= self.rtol, search.iterations)
        return settled, joint_norm(driven)


@dataclass
class _Search:
    """The iterations of some samples.

    Args:
        feedback: the error, and its way back.
        leak: α, (B, 1).
        share: 1 / (the size of J Jᵀ along the error + α), (B, 1).
        inverse: what Broyden's method has learned.
        u: the control, (B, n_L).
        driven: a_i, in the shape of the voltages.
        state: the network driven by these.
        value: −∂ℓ(r_L) − α u there.
        residual: (B,).
        iterations: made so far.
        wanted: by how much J(a)ᵀ u differed from a at the last iteration.
        shares: the part of it that each unit moves by.
    """

    feedback: ErrorFeedback
    leak: Tensor
    share: Tensor
    inverse: StoredSteps
    u: Tensor
    driven: list[Tensor]
    state: Deviation
    value: Tensor
    residual: Tensor
    iterations: int
    wanted: list[Tensor]
    shares: list[Tensor]

    @classmethod
    def begun(cls, feedback: ErrorFeedback, leak: Tensor, share: Tensor, u: Tensor, inverse: StoredSteps) -> _Search:
        """The first iteration, whose residual is not known: it takes another pull at where it has come to."""
        driven = feedback.back(u)
        state = feedback.forward.respond(driven)
        value = feedback.error(state) - leak * u
        unknown = torch.full_like(u[:, 0], torch.inf)
        ones = [torch.ones_like(a) for a in driven]
        return cls(feedback, leak, share, inverse, u, driven, state, value, unknown, 1, [], ones)

    def step(self, active: Tensor) -> None:
        """One iteration of the samples of a mask, (B,); the others stay as they are."""
        keep = active.unsqueeze(1)
        step = torch.where(keep, _shortened(self.inverse.step(self.value), self.u), 0.0)
        self.u = self.u + step
        change = share_missed(step, self.u)
        moved = self._move(self.feedback.back(self.u, self.state), change, active)
        self.state, before = self.feedback.forward.respond(self.driven), self.value
        self.value = self.feedback.error(self.state) - self.leak * self.u
        self.inverse.learn(step, self.value - before)
        found = torch.maximum(share_missed(self.value, self.feedback.error()), moved)
        self.residual = torch.where(active, found, self.residual)
        self.iterations += 1

    def _move(self, target: list[Tensor], change: Tensor, active: Tensor) -> Tensor:
        """Go to ``target``, but part of the way where that jumps; the share of ‖a‖ that it was, (B,).

        A jump is what turns back, by more than half of what it came by and than the ``change`` of u, (B,), explains.
        """
        wanted = [to - a for to, a in zip(target, self.driven)]
        for share, now, last, own in zip(self.shares, wanted, self.wanted, scaled(target, JUMP * change)):
            jumps = (now * last < last.square().mul_(-0.5)) & (now.square() > own.square_())
            share.mul_(torch.where(jumps, 0.5, REGROWTH)).clamp_(max=1.0)
        self.wanted = wanted
        moves = scaled([share * each for share, each in zip(self.shares, wanted)], active)
        self.driven = [a + each for a, each in zip(self.driven, moves)]
        return share_missed(joint_norm(moves), joint_norm(self.driven))

    def samples(self, index: Tensor) -> _Search:
        """The same of some samples only."""
        share = self.share[index]
        inverse = StoredSteps(lambda value: value * share)
        inverse.steps, inverse.norms = ([each[index] for each in of] for of in (self.inverse.steps, self.inverse.norms))
        feedback = self.feedback.samples(index)
        driven, wanted, shares = ([a[index] for a in of] for of in (self.driven, self.wanted, self.shares))
        return replace(
            self,
            feedback=feedback,
            leak=self.leak[index],
            share=share,
            inverse=inverse,
            u=self.u[index],
            driven=driven,
            state=feedback.forward.respond(driven),
            value=self.value[index],
            residual=self.residual[index],
            wanted=wanted,
            shares=shares,
        )

    def with_samples(self, index: Tensor, of: _Search) -> _Search:
        """This, where some samples are as ``of`` has them, but for what follows from u and a."""
        driven = [a.index_copy(0, index, b) for a, b in zip(self.driven, of.driven)]
        u, residual = (a.index_copy(0, index, b) for a, b in ((self.u, of.u), (self.residual, of.residual)))
        return replace(self, u=u, driven=driven, residual=residual, iterations=of.iterations)


def _shortened(step: Tensor, u: Tensor) -> Tensor:
    """The step, in each sample no longer than ``FAR_STEP`` times u."""
    length = torch.linalg.vector_norm(step, dim=1, keepdim=True)
    longest = FAR_STEP * torch.linalg.vector_norm(u, dim=1, keepdim=True)
    return torch.where(length > longest, step * (longest / length), step)
