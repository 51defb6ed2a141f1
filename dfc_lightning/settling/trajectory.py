"""The update averaged over the controlled dynamics, in closed form: DFC at the price of a steady state.

Write a = dt τ_u/τ_v, c = (1 − a)/a, x_i[t] for the somatic deviation of layer i and w[t] for the control as its apical
compartments hear it. A somatic step x_i[t] = (1 − a) x_i[t−1] + a (Q_i w[t] + δv_i^ff[t]) is

    x_i[t] − δv_i^ff[t] = Q_i w[t] − c (x_i[t] − x_i[t−1]),

so that over T steps from the feedforward state, in the nonlinear network too,

    Σ_t (v_i − v_i^ff) = T Q_i u* + Q_i H − c x_i[T],    H = Σ_t (w[t] − u*),

with u* the settled control. H, the area of the transient, is found by summing each of the other recursions likewise,
with the network linear in its distance from the settled state. At the end of the T steps, y being what leaks,

    (JQ + α̃ I) H = δr_L + c Σ_i J_i x_i + (α y − u_int/dt) α̃/α − α̃ m,

where m = Σ_t (u − w) is what the apical compartments have missed: nothing where they hear each control at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from dfc_lightning.errors import require
from dfc_lightning.passes.dense import DenseDeviation, DensePass, as_dense
from dfc_lightning.passes.forward_pass import ForwardPass
from dfc_lightning.passes.plasticity import Plasticity
from dfc_lightning.settling.broyden import Inverse
from dfc_lightning.settling.controller import PIController
from dfc_lightning.settling.inverse import DENSE_UP_TO
from dfc_lightning.settling.linearized import solve_linear
from dfc_lightning.settling.settled import Settled, Simulation, Taught, at_rest, relative_residual
from dfc_lightning.settling.steady_state import SteadyState
from dfc_lightning.settling.time_step import TimeStep


class End(NamedTuple):
    """The state in which the dynamics end."""

    settled: Settled
    somatic: list[Tensor]
    """x_i, one (B, n_i) a layer."""
    integral: Tensor
    """u_int, (B, n_L)."""
    heard: Tensor | None
    """w, (B, n_L), where it is not u itself."""


@dataclass(frozen=True)
class Trajectory(TimeStep, Simulation):
    """What :class:`Euler` of the same arguments computes, without its steps.

    The steady state is solved and stands for the whole of the time; only the area of the transient that leads to it
    is linearised. So the integrated update is exact as λ → 0, and as T → ∞ for any λ. Relative error against 1000
    steps of 0.02, tanh 20-16-16-16-10 with cross-entropy: 2e-5 at λ = 6e-4 (5e-6 unless ``settled``), 5e-4 at 0.08,
    6e-3 at 1, where the last state's update, DFC-SS, is 3e-2 off at any λ. Widths 6-5-4-3, squared error: 2e-2 at 1.

    Args:
        settled: take the network as settled after T steps. Else what is left of the transient by then is computed,
            from the T-th power of a matrix of (L + 2) n_L rows a sample: outputs up to ``DENSE_UP_TO`` only.
            Where the dynamics do not come to rest (Condition 3 broken), only this shows it.
        rtol: relative residual of the steady state to reach; None as in :class:`SteadyState`.
        tolerance: as in :class:`Euler`; used unless ``settled``, where ``rtol`` alone decides on convergence.
        error_reduction: likewise.
    """

    chains_only: ClassVar[bool] = True

    settled: bool = True
    rtol: float | None = None
    tolerance: float = 1e-5
    error_reduction: float = 0.25

    def __post_init__(self) -> None:
        Simulation.__post_init__(self)
        TimeStep.__post_init__(self)
        SteadyState(self.rtol)  # checks it

    def settle(self, forward: ForwardPass, offset: Tensor, controller: PIController) -> Settled:
        """The last state, or the one it tends to if taken as ``settled``; see :class:`Settling`."""
        chain = self._chain(forward)
        steady = SteadyState(self.rtol).settle(chain, offset, controller)
        return self._end(chain, offset, controller, steady).settled

    def settle_and_integrate(
        self,
        forward: ForwardPass,
        offset: Tensor,
        controller: PIController,
        plasticity: Plasticity,
        drop_unconverged: bool,
    ) -> tuple[Settled, Taught]:
        """Settle and average the update over the ``steps`` + 1 states, the first of which gives none."""
        chain = self._chain(forward)
        steady, inverse = SteadyState(self.rtol).solve(chain, offset, controller)
        end = self._end(chain, offset, controller, steady)
        tail = [(1 - self.somatic_share) / self.somatic_share * x for x in end.somatic]
        area, found = self._area(chain, controller, end, tail, inverse)
        settled = replace(end.settled, converged=end.settled.converged & found)
        counted = settled.counted(drop_unconverged) & torch.isfinite(area).all(1)

        at_rest: Any = steady.response.where(counted)
        signals = []
        for signal, slope, apical, late in zip(
            chain.postsynaptic(at_rest, plasticity), chain.slopes, chain.apical(area), tail
        ):
            transient = apical - late if plasticity == "voltage_difference" else slope * (apical - late)
            signals.append(self.steps * signal + torch.where(counted.unsqueeze(1), transient, 0.0))
        return settled, chain.gradients(signals, chain.heard(at_rest), 1 / (self.steps + 1))

    @staticmethod
    def _chain(forward: ForwardPass) -> DensePass:
        return as_dense(
            forward,
            "settling=Trajectory(...)",
            "Simulate it with settling=Euler(...), or take the steady state with settling=SteadyState() and "
            "integrate=False.",
        )

    def _area(
        self, chain: DensePass, controller: PIController, end: End, tail: list[Tensor], inverse: Inverse | None
    ) -> tuple[Tensor, Tensor]:
        """H, (B, n_L), and for which samples it was found; begun from an inverse that may be at hand."""
        u, response = end.settled.control, end.settled.response
        if self.delayed:  # the last rates have not yet arrived anywhere
            tail = [late + basal for late, basal in zip(tail, response.basal)]
        leaking, share = u, 1.0
        if controller.leak == "integral":
            leaking, share = end.integral, 1 / (1 + controller.alpha * controller.k_p)
        missed = torch.zeros_like(u) if self.proactive else u
        if end.heard is not None:
            missed = missed + (1 - self.apical_share) / self.apical_share * end.heard
        right = response.output + chain.linear_response(tail)
        right = right + share * (controller.alpha * leaking - end.integral / self.dt)
        right = right - controller.steady_leakage * missed
        # A small correction, so found to ten times the accuracy of the steady state only.
        accuracy = 10 * SteadyState(self.rtol).accuracy(right.dtype)
        return solve_linear(chain, right, controller.steady_leakage, accuracy, 30, inverse)[:2]

    def _end(self, chain: DensePass, offset: Tensor, controller: PIController, steady: Settled) -> End:
        u, response, leakage = steady.control, steady.response, controller.steady_leakage
        somatic = [basal + driven for basal, driven in zip(response.basal, response.driven)]
        integral = u - controller.k_p * leakage * u
        if self.settled:
            return End(steady, somatic, integral, u if self.apical_tau is not None else None)

        require(
            chain.outputs <= DENSE_UP_TO,
            "settled",
            self.settled,
            f"with {chain.outputs} outputs, more than {DENSE_UP_TO}, the exact last state takes too much memory; "
            "use settled=True, or Euler(...)",
        )
        filters = chain.depth if self.apical_tau is None else chain.depth + 1
        left = self._left(chain, controller, [-integral, -u, *[-u] * filters])
        slopes, lagging = chain.slopes, left[2 : 2 + chain.depth]
        heard = None if self.apical_tau is None else u + left[-1]
        integral, u = integral + left[0], u + left[1]
        # x_i = Σ_k W_i D_{i−1} … W_{k+1} D_k Q_k s_{i−k+1}, s_m the control as m somata in a row have filtered it:
        # for each m the layers beyond still need, one set of rows through the network.
        rows = lagging @ chain.feedback[0].T
        somatic[0] = somatic[0] + rows[0]
        for i in range(1, chain.depth):
            rows = (rows[1:] * slopes[i - 1]) @ chain.weights[i].T + lagging[: len(rows) - 1] @ chain.feedback[i].T
            somatic[i] = somatic[i] + rows[0]

        basal, rates = [response.basal[0]], list[Tensor]()
        for i, (phi, x) in enumerate(zip(chain.nonlinearities, somatic)):
            if i:
                basal.append(rates[-1] @ chain.weights[i].T)
            rates.append(phi.difference(chain.v[i], chain.r[i], x, slopes[i]))
        response = DenseDeviation(basal, [x - b for x, b in zip(somatic, basal)], rates, delayed=self.delayed)
        error = offset - rates[-1]
        rest = at_rest(chain, offset, error, leakage * u, self.tolerance, self.error_reduction)
        residual = relative_residual(offset, rates[-1], u, leakage)
        converged = steady.converged & rest
        return End(Settled(u, response, residual, converged, self.steps), somatic, integral, heard)

    def _left(self, chain: DensePass, controller: PIController, start: list[Tensor]) -> Tensor:
        """What is left after ``steps`` steps of distances from the settled state: of u_int, u, s_1 … s_L and maybe w.

        Stacked, (L + 2, B, n_L) or with w one more.
        """
        jacobians = chain.jacobians()
        gains = [j @ q for j, q in zip(jacobians, chain.feedback)]
        blocks, (batch, n) = len(start), start[0].shape
        each = torch.eye(blocks * n, dtype=gains[0].dtype, device=gains[0].device).view(blocks, n, -1)
        power = torch.cat([b.expand(batch, -1, -1) for b in self._advance(list(each), gains, controller)], dim=1)
        state = torch.cat(start, dim=1).unsqueeze(2)
        steps = self.steps
        while steps:
            if steps % 2:
                state = power @ state
            if steps := steps // 2:
                power = power @ power
        return state.view(batch, blocks, n).transpose(0, 1)

    def _advance(self, state: list[Tensor], gains: list[Tensor], controller: PIController) -> list[Tensor]:
        """One step of the linear dynamics about the settled state, as :class:`Dynamics` makes it."""
        integral, u, *somata = state
        filtered = [somata.pop()] if self.apical_tau is not None else []
        # δr_L = Σ_k J_k Q_k s_{L−k+1}
        error = -torch.stack([gain @ s for gain, s in zip(gains, reversed(somata))]).sum(0)
        leak = integral if controller.leak == "integral" else u
        integral = integral + self.dt * (error - controller.alpha * leak)
        before, u = u.expand_as(integral), integral + controller.k_p * error
        arriving = u if self.proactive else before
        if filtered:
            arriving = torch.lerp(filtered[0].expand_as(u), arriving, self.apical_share)
            filtered = [arriving]
        moved = []
        for s in (s.expand_as(u) for s in somata):
            moved.append(torch.lerp(s, arriving, self.somatic_share))
            arriving = s if self.delayed else moved[-1]
        return [integral, u, *moved, *filtered]
