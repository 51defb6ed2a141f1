"""The controlled dynamics in discrete time, in deviations from feedforward.

Meulemans et al. 2021, Eq. (1): τ_v dv_i/dt = −v_i + W_i φ(v_{i−1}) + b_i + Q_i u, and Eq. (4):
u = u_int + k_p e, τ_u du_int/dt = e − leak. Time is in units of τ_u. The order of updates within a step is that
of the authors' published code, so that equal settings give equal trajectories.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dfc_lightning.control.chain import Activity, Chain, Response
from dfc_lightning.control.checks import require
from dfc_lightning.control.controller import PIController
from dfc_lightning.control.evaluator import Deviation, Evaluator, ForwardPass


@dataclass(frozen=True)
class TimeStep:
    """How a step of the dynamics is discretised.

    Args:
        dt: length of a step, in units of the controller's time constant τ_u.
        tau_ratio: somatic time constant τ_v / τ_u, at least ``dt``.
        apical_tau: apical time constant τ_A / τ_u, at least ``dt``; None for an instantaneous apical compartment.
        instant_transmission: rates of this step, not of the last, reach the next layer.
        instant_system: somata follow their compartments at once; implies ``instant_transmission``.
        proactive: the apical compartments hear the control of this step, not of the last.
    """

    dt: float
    tau_ratio: float
    apical_tau: float | None = None
    instant_transmission: bool = True
    instant_system: bool = False
    proactive: bool = True

    def __post_init__(self) -> None:
        require(self.dt > 0, "dt", self.dt, "give a step above zero, e.g. 0.02")
        require(self.dt <= 1, "dt", self.dt, "give a step of at most the controller's time constant, 1")
        remedy = f"the step dt={self.dt} is larger than this time constant; lower dt or raise it"
        require(self.instant_system or self.dt <= self.tau_ratio, "tau_ratio", self.tau_ratio, remedy)
        require(self.apical_tau is None or self.dt <= self.apical_tau, "apical_tau", self.apical_tau, remedy)


class ControlledDynamics(ABC):
    """The controller, and the state of a network of any kind in time.

    The state is to be read after a step: ``u``, ``u_int``, ``stacked_apical``, and ``basal``, ``somatic`` and ``rates``
    of each layer. All but the rates are overwritten by the next step; clone what is to be kept. No step looks at data
    on the host, except for a nonlinearity that does on the CPU.

    Args:
        network: the controlled network.
        activity: its feedforward activity, where the dynamics start.
        offset: target minus feedforward output, δ_L, (B, n_L).
        controller: the controller.
        step: the discretisation.
    """

    rates: list[Tensor]

    def __init__(
        self, network: Evaluator, activity: ForwardPass, offset: Tensor, controller: PIController, step: TimeStep
    ) -> None:
        self.offset, self.controller, self.step = offset, controller, step
        self.u = torch.zeros_like(offset)
        self.u_int = torch.zeros_like(offset)
        self.stacked_apical = offset.new_zeros(offset.shape[0], sum(network.widths))
        self.basal = [torch.zeros_like(v) for v in activity.v]
        self.somatic = [torch.zeros_like(v) for v in activity.v]
        self._feedback = network.stacked_feedback
        self._u_before = torch.zeros_like(offset)
        self._error = torch.empty_like(offset)

    @abstractmethod
    def advance_compartments(self, noise: Tensor | None = None) -> None:
        """One step of apical, basal and somatic compartments of all layers.

        Args:
            noise: added to the apical voltages, (B, Σ n_i).
        """

    @abstractmethod
    def response(self) -> Deviation:
        """The present state, with each basal voltage that of the present rates upstream."""

    @abstractmethod
    def trail(self, driven: bool = True) -> Deviation:
        """The present state, with each basal voltage as it was used in this step; ``driven`` on request."""

    @property
    def error(self) -> Tensor:
        """The output's distance from its target, e = r_L* − r_L, (B, n_L)."""
        return self.offset - self.rates[-1]

    def advance_control(self) -> None:
        """One step of the controller, from the present error."""
        dt, pi = self.step.dt, self.controller
        error = torch.sub(self.offset, self.rates[-1], out=self._error)
        self._u_before.copy_(self.u)
        leak = self.u_int if pi.leak == "integral" else self.u
        self.u_int.sub_(leak, alpha=dt * pi.alpha).add_(error, alpha=dt)
        self.u = torch.add(self.u_int, error, alpha=pi.k_p, out=self.u) if pi.k_p else self.u_int

    @property
    def driven(self) -> list[Tensor]:
        """δv_i − δv_i^ff of each layer."""
        return [s - b for s, b in zip(self.somatic, self.basal)]

    def snapshot(self) -> list[Tensor]:
        """A copy of what moves: control, apical and somatic voltages."""
        return [state.clone() for state in (self.u, self.stacked_apical, *self.somatic)]

    def moves(self, before: Sequence[Tensor], speed: float) -> bool:
        """Whether anything in any sample has changed by more than ``speed`` of its norm per τ_u in the last step.

        Args:
            before: :meth:`snapshot` before that step.
            speed: in units of 1 / τ_u.
        """
        share, norm = speed * self.step.dt, torch.linalg.vector_norm
        states = zip((self.u, self.stacked_apical, *(s.flatten(1) for s in self.somatic)), before)
        still = torch.stack([norm(now - then.flatten(1), dim=1) <= share * norm(now, dim=1) for now, then in states])
        return not bool(still.all())

    def _advance_apical(self, noise: Tensor | None) -> None:
        step = self.step
        share = 1.0 if step.apical_tau is None else step.dt / step.apical_tau
        heard = self.u if step.proactive else self._u_before
        self.stacked_apical.addmm_(heard, self._feedback.T, beta=1 - share, alpha=share)
        if noise is not None:
            self.stacked_apical.add_(noise)

    @property
    def _instant(self) -> bool:
        return self.step.instant_transmission or self.step.instant_system


class Dynamics(ControlledDynamics):
    """The state of a chain and its two half steps, :meth:`advance_control` and :meth:`advance_compartments`."""

    def __init__(
        self, chain: Chain, activity: Activity, offset: Tensor, controller: PIController, step: TimeStep
    ) -> None:
        super().__init__(chain, activity, offset, controller, step)
        self.chain, self.activity = chain, activity
        self.rates = [torch.zeros_like(v) for v in activity.v]

    def advance_compartments(self, noise: Tensor | None = None) -> None:
        """One step of apical, basal and somatic compartments of all layers.

        Args:
            noise: added to the apical voltages, (B, Σ n_i).
        """
        step, weights = self.step, self.chain.weights
        self._advance_apical(noise)
        if not self._instant:  # before any rates change, which may be the somatic voltages themselves
            for i in range(1, len(weights)):
                torch.mm(self.rates[i - 1], weights[i].T, out=self.basal[i])
        share = 1.0 if step.instant_system else step.dt / step.tau_ratio
        for i, apical in enumerate(self.stacked_apical.split(self.chain.widths, dim=1)):
            if i and self._instant:
                torch.mm(self.rates[i - 1], weights[i].T, out=self.basal[i])
            self.somatic[i].lerp_(apical, share)
            if i:
                self.somatic[i].add_(self.basal[i], alpha=share)
            self.rates[i] = self.chain.nonlinearities[i].difference(
                self.activity.v[i], self.activity.r[i], self.somatic[i], self.activity.slopes[i]
            )

    def response(self) -> Response:
        """The present state, with each basal voltage that of the present rates upstream."""
        basal = [self.rates[i - 1] @ w.T if i else self.basal[0] for i, w in enumerate(self.chain.weights)]
        return Response(basal, self.driven, list(self.rates), delayed=not self._instant)

    def trail(self, driven: bool = True) -> Response:
        """The present state, with each basal voltage as it was used in this step; ``driven`` on request."""
        return Response(list(self.basal), self.driven if driven else [], list(self.rates))


def stacked_noise(sigmas: Sequence[float], widths: Sequence[int], like: Tensor) -> Tensor:
    """A row of σ_i for the units of each layer, (Σ n_i,), to scale standard normal draws with."""
    return torch.cat([like.new_full((n,), s) for n, s in zip(widths, sigmas)])
