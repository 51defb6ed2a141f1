"""The dynamics of a network that is driven the whole way to its labels, e = y − g(r_L), in discrete time.

Meulemans et al. 2022, Eqs. 1 to 3, are Eqs. (1) and (4) of Meulemans et al. 2021 with that error; see :mod:`.dynamics`
for the order of updates. Where the way is long, deviations from feedforward save no digits: a chain is simulated in
voltages and rates as they are, each step in place, with one product and one nonlinearity a layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import singledispatch

import torch
from torch import Tensor

from dfc_lightning.losses.link import Link, linked
from dfc_lightning.operations.nonlinearity import Nonlinearity, Tanh
from dfc_lightning.operations.operation import constant
from dfc_lightning.passes.dense import DenseDeviation, DensePass
from dfc_lightning.passes.forward_pass import Deviation, ForwardPass
from dfc_lightning.passes.plasticity import Plasticity
from dfc_lightning.settling.controller import PIController
from dfc_lightning.settling.dynamics import controlled, dynamics_of
from dfc_lightning.settling.settled import Taught
from dfc_lightning.settling.time_step import TimeStep
from dfc_lightning.settling.update_sums import GeneralSums, UpdateSums, update_sums


class StrongDynamics(ABC):
    """Controller and network in time; :func:`strong_dynamics` makes them.

    What is there to be read is overwritten by the next step; clone what is to be kept.
    """

    @property
    @abstractmethod
    def u(self) -> Tensor:
        """The control, (B, n_L)."""

    @property
    @abstractmethod
    def stacked_apical(self) -> Tensor:
        """The apical voltages of all ports, noise included, (B, Σ n_i)."""

    @property
    @abstractmethod
    def error(self) -> Tensor:
        """The present state's e = y − g(r_L), (B, n_L)."""

    @abstractmethod
    def advance_control(self) -> None:
        """One step of the controller."""

    @abstractmethod
    def advance_compartments(self, noise: Tensor | None = None) -> None:
        """One step of all compartments; ``noise``, (B, Σ n_i), is added to the apical voltages."""

    @abstractmethod
    def count(self) -> None:
        """Count the present state into :meth:`sums`."""

    @abstractmethod
    def sums(self) -> Taught:
        """The sum over the states counted of the batch-mean update in each."""

    @abstractmethod
    def response(self) -> Deviation:
        """The present state in deviations from feedforward."""


@singledispatch
def strong_dynamics(
    forward: ForwardPass,
    offset: Tensor,
    link: Link,
    controller: PIController,
    step: TimeStep,
    plasticity: Plasticity,
    weight: Tensor | None = None,
) -> StrongDynamics:
    """The dynamics from the feedforward state on, rates reaching the next layer within a step.

    Args:
        forward: the feedforward pass.
        offset: e at the start, y − g(r_L⁻), (B, n_L).
        link: g.
        controller: the controller.
        step: the discretisation.
        plasticity: the postsynaptic factor of the sums.
        weight: what each sample counts for in them, (B, 1); None for 1.
    """
    return StrongGeneral(forward, offset, link, controller, step, plasticity, weight)


class StrongGeneral(StrongDynamics):
    """For any network: the dynamics in deviations, given at each step the target that makes their error e."""

    def __init__(
        self,
        forward: ForwardPass,
        offset: Tensor,
        link: Link,
        controller: PIController,
        step: TimeStep,
        plasticity: Plasticity,
        weight: Tensor | None = None,
    ) -> None:
        self._inner = dynamics_of(forward, offset, controller, step)
        self._sums: UpdateSums = (
            update_sums(forward, plasticity, 1.0) if weight is None else GeneralSums(forward, plasticity, 1.0, weight)
        )
        self._link, self._output = link, forward.output
        self._label = offset + linked(link, forward.output)

    @property
    def u(self) -> Tensor:
        return self._inner.u

    @property
    def stacked_apical(self) -> Tensor:
        return self._inner.stacked_apical

    @property
    def error(self) -> Tensor:
        return self._label - linked(self._link, self._output + self._inner.rates[-1])

    def advance_control(self) -> None:
        self._inner.offset = self.error + self._inner.rates[-1]  # from which they subtract δr_L again
        self._inner.advance_control()

    def advance_compartments(self, noise: Tensor | None = None) -> None:
        self._inner.advance_compartments(noise)

    def count(self) -> None:
        self._sums.add(self._inner, 1)

    def sums(self) -> Taught:
        return self._sums.totals()

    def response(self) -> Deviation:
        return self._inner.response()


class StrongChain(StrongDynamics):
    """For chains of dense layers: ``v``, ``basal`` and ``r`` of each layer, (B, n_i), as they are."""

    def __init__(
        self,
        forward: DensePass,
        offset: Tensor,
        link: Link,
        controller: PIController,
        step: TimeStep,
        plasticity: Plasticity,
        weight: Tensor | None = None,
    ) -> None:
        self.forward, self.controller, self.step, self.plasticity = forward, controller, step, plasticity
        self._weight = weight
        self.v = [v.clone() for v in forward.v]
        self.basal = [v.clone() for v in forward.v]  # the first layer's stays as it is
        self.r = [r.clone() for r in forward.r]
        self._u, self._u_int, self._u_before = (torch.zeros_like(offset) for _ in range(3))
        self._apical = offset.new_zeros(offset.shape[0], sum(forward.widths))
        self._feedback = forward.stacked_feedback.T
        self._link, self._label = link, offset + linked(link, forward.output)
        self._biases = [
            v.new_zeros(()) if b is None else constant(b, v.dtype) for b, v in zip(forward.biases, forward.v)
        ]
        self._signals = [torch.empty_like(v) for v in forward.v]
        self._posts = [torch.zeros_like(v) for v in forward.v]
        self._products = [v.new_zeros(w.shape) for v, w in zip(forward.v, forward.weights)][1:]

    @property
    def u(self) -> Tensor:
        return self._u

    @property
    def stacked_apical(self) -> Tensor:
        return self._apical

    @property
    def error(self) -> Tensor:
        return self._label - linked(self._link, self.r[-1])

    def advance_control(self) -> None:
        self._u_before.copy_(self._u)
        self._u = controlled(self.controller, self.step.dt, self.error, self._u_int, self._u)

    def advance_compartments(self, noise: Tensor | None = None) -> None:
        step, weights = self.step, self.forward.weights
        share, heard = step.apical_share, self._u if step.proactive else self._u_before
        self._apical.addmm_(heard, self._feedback, beta=1 - share, alpha=share)
        if noise is not None:
            self._apical.add_(noise)
        share = step.somatic_share
        for i, apical in enumerate(self._apical.split(self.forward.widths, dim=1)):
            if i:
                torch.addmm(self._biases[i], self.r[i - 1], weights[i].T, out=self.basal[i])
            self.v[i].lerp_(self.basal[i], share).add_(apical, alpha=share)
            _write(self.forward.nonlinearities[i], self.v[i], self.r[i])

    def count(self) -> None:
        for i, (signal, post) in enumerate(zip(self._postsynaptic(), self._posts)):
            post.add_(signal)
            if i:
                self._products[i - 1].addmm_(signal.T, self.r[i - 1])

    def _postsynaptic(self) -> list[Tensor]:
        for i, (signal, phi) in enumerate(zip(self._signals, self.forward.nonlinearities)):
            if self.plasticity == "rate_difference":
                if i:
                    _write(phi, self.basal[i], signal)
                torch.sub(self.r[i], signal if i else self.forward.r[0], out=signal)
            else:
                torch.sub(self.v[i], self.basal[i], out=signal)
                if self.plasticity == "derivative":
                    signal.mul_(self.forward.slopes[i])
            if self._weight is not None:
                signal.mul_(self._weight)
        return self._signals

    def sums(self) -> Taught:
        taught, share = self.forward.gradients(self._posts), 1 / self.forward.batch_size
        for (weight, *_), products in zip(taught[1:], self._products):
            torch.mul(products, share, out=weight)
        return taught

    def response(self) -> DenseDeviation:
        forward = self.forward
        basal = [b - v for b, v in zip(self.basal, forward.v)]
        driven = [v - b for v, b in zip(self.v, self.basal)]
        return DenseDeviation(basal, driven, [r - at_rest for r, at_rest in zip(self.r, forward.r)])


strong_dynamics.register(DensePass, StrongChain)


def _write(phi: Nonlinearity, v: Tensor, r: Tensor) -> None:
    """φ(v) into ``r``."""
    if isinstance(phi, Tanh):
        torch.tanh(v, out=r)
    else:
        r.copy_(phi(v))
