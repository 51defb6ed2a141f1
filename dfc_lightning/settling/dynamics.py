"""The controlled dynamics in discrete time, in deviations from feedforward.

Meulemans et al. 2021, Eq. (1): τ_v dv_i/dt = −v_i + W_i φ(v_{i−1}) + b_i + Q_i u, and Eq. (4):
u = u_int + k_p e, τ_u du_int/dt = e − leak. Time is in units of τ_u. The order of updates within a step is that
of the authors' published code, so that equal settings give equal trajectories.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import singledispatch

import torch
from torch import Tensor

from dfc_lightning.passes.forward_pass import Deviation, ForwardPass
from dfc_lightning.settling.controller import PIController
from dfc_lightning.settling.time_step import TimeStep


class ControlledDynamics(ABC):
    """The controller, and the state of a network of any kind in time; :func:`dynamics_of` makes it.

    The state is to be read after a step: ``u``, ``u_int``, ``stacked_apical``, and ``basal``, ``somatic`` and ``rates``
    of each layer. All but the rates are overwritten by the next step; clone what is to be kept. No step looks at data
    on the host, except for a nonlinearity that does on the CPU.

    Args:
        forward: the feedforward pass, where the dynamics start.
        offset: target minus feedforward output, δ_L, (B, n_L).
        controller: the controller.
        step: the discretisation.
    """

    rates: list[Tensor]

    def __init__(self, forward: ForwardPass, offset: Tensor, controller: PIController, step: TimeStep) -> None:
        self.offset, self.controller, self.step = offset, controller, step
        self.u = torch.zeros_like(offset)
        self.u_int = torch.zeros_like(offset)
        self.stacked_apical = offset.new_zeros(offset.shape[0], sum(forward.widths))
        self.basal = [torch.zeros_like(v) for v in forward.v]
        self.somatic = [torch.zeros_like(v) for v in forward.v]
        self._pass = forward
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
        error = torch.sub(self.offset, self.rates[-1], out=self._error)
        self._u_before.copy_(self.u)
        self.u = controlled(self.controller, self.step.dt, error, self.u_int, self.u)

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
        share = self.step.apical_share
        heard = self.u if self.step.proactive else self._u_before
        if self._pass.layered:
            arriving = torch.cat([a.flatten(1) for a in self._pass.apical(heard)], dim=1)
            self.stacked_apical.lerp_(arriving, share)
        else:
            heard = heard if self._pass.unit is None else heard / self._pass.unit.size
            self.stacked_apical.addmm_(heard, self._pass.stacked_feedback.T, beta=1 - share, alpha=share)
        if noise is not None:
            self.stacked_apical.add_(noise)


def controlled(controller: PIController, dt: float, error: Tensor, u_int: Tensor, u: Tensor) -> Tensor:
    """One step of the controller: u, written over ``u`` as ``u_int`` is over itself; without gain u is ``u_int``."""
    leak = u_int if controller.leak == "integral" else u
    u_int.sub_(leak, alpha=dt * controller.alpha).add_(error, alpha=dt)
    return torch.add(u_int, error, alpha=controller.k_p, out=u) if controller.k_p else u_int


@singledispatch
def dynamics_of(forward: ForwardPass, offset: Tensor, controller: PIController, step: TimeStep) -> ControlledDynamics:
    """The controlled dynamics of the network that ``forward`` is a pass of; see :class:`ControlledDynamics`."""
    raise NotImplementedError(f"no dynamics are registered for a {type(forward).__name__}")


def stacked_noise(sigmas: Sequence[float], widths: Sequence[int], like: Tensor) -> Tensor:
    """A row of σ_i for the units of each layer, (Σ n_i,), to scale standard normal draws with."""
    return torch.cat([like.new_full((n,), s) for n, s in zip(widths, sigmas)])
