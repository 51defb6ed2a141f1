"""Stability of the dynamics as they are stepped, where the discretisation counts.

In continuous time a proactive controller is a plain one. In steps of dt it is not, nor is delayed transmission an
instantaneous one: z[t+1] = A z[t] + const, stable where all eigenvalues of A lie within the unit circle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dfc_lightning.control.chain import Chain
from dfc_lightning.control.controller import PIController
from dfc_lightning.control.nonlinearity import Nonlinearity
from dfc_lightning.metrics.base import SampleMean
from dfc_lightning.metrics.stability import Reduction, eigenvalues
from dfc_lightning.settling.dynamics import Dynamics, TimeStep


class _Linear(Nonlinearity):
    """A nonlinearity to first order: differences are slope times deviation."""

    def __init__(self, slope: Tensor) -> None:
        self._slope = slope

    def __call__(self, v: Tensor) -> Tensor:
        return self._slope * v

    def slope(self, v: Tensor, r: Tensor) -> Tensor:
        return self._slope.expand_as(v)

    def difference(self, v: Tensor, r: Tensor, d: Tensor, slope: Tensor | None = None) -> Tensor:
        return self._slope * d


def step_matrix(chain: Chain, slopes: Sequence[Tensor], controller: PIController, step: TimeStep) -> Tensor:
    """The matrix A of one step of the linearised dynamics for one sample: a step from each unit vector of z.

    z holds the integral control, the control, all somatic voltages and, where they have a time constant of their own,
    all apical ones, as deviations from feedforward.

    Args:
        chain: the controlled chain.
        slopes: D_i = φ'(v_i) of the sample, one (n_i,) a layer.
        controller: the controller.
        step: the discretisation.
    """
    doubled = [[t.double() for t in tensors] for tensors in (chain.weights, chain.feedback)]
    linear = [_Linear(d.double()) for d in slopes]
    chain = Chain(doubled[0], [None] * chain.depth, linear, doubled[1])
    units, outputs = sum(chain.widths), chain.widths[-1]
    sizes = [outputs, outputs, units] + ([units] if step.apical_tau is not None else [])
    z = torch.eye(sum(sizes), dtype=torch.float64, device=slopes[0].device)
    activity = chain.feedforward(z.new_zeros(len(z), chain.weights[0].shape[1]))
    dynamics = Dynamics(chain, activity, z.new_zeros(len(z), outputs), controller, step)
    dynamics.u_int, dynamics.u, somatic, *apical = z.split(sizes, dim=1)
    dynamics.somatic = list(somatic.split(chain.widths, dim=1))
    dynamics.rates = [phi(v) for phi, v in zip(linear, dynamics.somatic)]
    if apical:
        dynamics.stacked_apical = apical[0]
    dynamics.advance_control()
    dynamics.advance_compartments()
    after = [dynamics.u_int, dynamics.u, *dynamics.somatic] + ([dynamics.stacked_apical] if apical else [])
    return torch.cat(after, dim=1).T


def step_growth_rate(
    chain: Chain,
    slopes: Sequence[Tensor],
    controller: PIController,
    step: TimeStep,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The rate at which the stepped dynamics grow, per τ_u; below zero where they are stable.

    .. math:: \max \frac{\log \lvert \lambda(A) \rvert}{dt}

    which tends to the largest real part of :func:`control_matrix`'s eigenvalues as dt → 0.

    Args:
        chain: the controlled chain.
        slopes: D_i = φ'(v_i), one (B, n_i) a layer.
        controller: the controller.
        step: the discretisation: plain or proactive, delayed or instantaneous transmission.
        reduction: over samples: ``"mean"``, ``"max"`` or ``"none"``.

    Example:
        >>> import torch
        >>> from dfc_lightning.control.nonlinearity import Identity
        >>> one = torch.eye(1)
        >>> chain = Chain([one], [None], [Identity()], [one])
        >>> for proactive in (False, True):
        ...     step = TimeStep(dt=0.5, tau_ratio=0.5, proactive=proactive)
        ...     print(f"{step_growth_rate(chain, [one], PIController(alpha=0.0), step):.3f}")
        -0.693
        -1.386
    """
    samples = [[d[b] for d in slopes] for b in range(slopes[0].shape[0])]
    matrices = torch.stack([step_matrix(chain, sample, controller, step) for sample in samples])
    rates = eigenvalues(matrices).abs().amax(1).log() / step.dt
    return rates if reduction == "none" else getattr(rates, reduction)()


class StepGrowthRate(SampleMean):
    """Growth rate of the stepped dynamics, a mean over samples; see :func:`step_growth_rate`.

    Args:
        controller: the controller.
        step: the discretisation.
        **kwargs: of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from dfc_lightning.control.nonlinearity import Identity
        >>> one = torch.eye(1)
        >>> metric = StepGrowthRate(PIController(alpha=0.0), TimeStep(dt=0.5, tau_ratio=0.5))
        >>> metric.update(Chain([one], [None], [Identity()], [one]), [one])
        >>> print(f"{metric.compute():.3f}")
        -1.386
    """

    higher_is_better = False

    def __init__(self, controller: PIController, step: TimeStep, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.controller, self.step = controller, step

    def update(self, chain: Chain, slopes: Sequence[Tensor]) -> None:
        """Count a batch in: the chain and D_i, one (B, n_i) a layer."""
        self.add(step_growth_rate(chain, slopes, self.controller, self.step, "none"))
