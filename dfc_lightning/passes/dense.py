"""A chain of dense layers and elementwise nonlinearities, in closed form and in deviations from feedforward.

Feedforward, v_i⁻ = W_i r_{i−1}⁻ + b_i and r_i⁻ = φ(v_i⁻). With a control signal u the layers hold
δv_i = δv_i^ff + a_i: basal deviation δv_i^ff = W_i δr_{i−1} and apical voltage a_i = Q_i u. Working with the
deviations, W_1 x and all biases drop out and float32 keeps its digits however small u is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, singledispatch
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dfc_lightning.errors import ControlError
from dfc_lightning.losses.linked_loss import LinkedLoss
from dfc_lightning.operations.nonlinearity import Identity, Nonlinearity
from dfc_lightning.operations.operation import constant
from dfc_lightning.passes.chance import Chance
from dfc_lightning.passes.closed_forms import jacobians, output_gain
from dfc_lightning.passes.forward_pass import Deviation, ForwardPass, Unit
from dfc_lightning.passes.plasticity import Plasticity

WIDE = 64
"""Outputs from which on an identity Q_L is worth looking for."""


@dataclass
class DenseDeviation(Deviation):
    """How a controlled chain deviates from feedforward; one (B, n_i) a layer in each list.

    Args:
        basal: δv_i^ff = W_i δr_{i−1}, what the layer's own input drives it to.
        driven: δv_i − δv_i^ff, what the feedback drives it to beyond that: settled, the apical voltage Q_i u.
        rates: δr_i = φ(v_i⁻ + δv_i) − φ(v_i⁻).
        delayed: whether the rates are those of earlier voltages than these, transmission being delayed.
    """

    basal: list[Tensor]
    driven: list[Tensor]
    rates: list[Tensor]
    delayed: bool = False

    @property
    def output(self) -> Tensor:
        return self.rates[-1]

    def where(self, keep: Tensor, other: DenseDeviation | None = None) -> DenseDeviation:
        mask = keep.unsqueeze(1)

        def choose(mine: list[Tensor], others: list[Tensor] | None) -> list[Tensor]:
            if others is None:
                return [torch.where(mask, each, torch.zeros_like(each)) for each in mine]
            return [torch.where(mask, each, another) for each, another in zip(mine, others)]

        return DenseDeviation(
            choose(self.basal, None if other is None else other.basal),
            choose(self.driven, None if other is None else other.driven),
            choose(self.rates, None if other is None else other.rates),
            self.delayed,
        )


class Layers(NamedTuple):
    """The layers of a chain.

    Args:
        weights: W_i, (n_i, n_{i−1}), in any dtype.
        biases: b_i, (n_i,), or None.
        nonlinearities: φ_i; the last layer's is the identity unless the network has it otherwise.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    nonlinearities: Sequence[Nonlinearity]


@dataclass(eq=False)
class DensePass(ForwardPass[DenseDeviation]):
    """A feedforward pass of a chain.

    Args:
        layers: the chain's layers; changes of their weights are seen by :meth:`again`.
        feedback: Q_i, (n_i, n_L), or B_i, (n_i, n_{i−1}).
        x: the network's input r_0, (B, n_0).
        v: feedforward voltages v_i⁻, one (B, n_i) a layer.
        r: feedforward rates r_i⁻ = φ(v_i⁻), likewise.
        layered: see :class:`ForwardPass`.
        unit: likewise.
        chance: likewise.
        loss: likewise.
    """

    dense: ClassVar[bool] = True

    layers: Layers
    feedback: Sequence[Tensor]
    x: Tensor
    v: list[Tensor]
    r: list[Tensor]
    layered: bool = False
    unit: Unit | None = None
    chance: Chance = field(default_factory=lambda: Chance(0, 0))
    loss: LinkedLoss | None = None

    @classmethod
    def run(cls, x: Tensor, layers: Layers, feedback: Sequence[Tensor] = ()) -> DensePass:
        """Feed ``x``, (B, n_0), forward."""
        voltages: list[Tensor] = []
        rates: list[Tensor] = []
        for w, b, phi in zip(*layers):
            bias = None if b is None else constant(b, x.dtype)
            voltages.append(torch.nn.functional.linear(rates[-1] if rates else x, constant(w, x.dtype), bias))
            rates.append(phi(voltages[-1]))
        return cls(layers, feedback, x, voltages, rates)

    @cached_property
    def weights(self) -> list[Tensor]:
        """W_i, (n_i, n_{i−1}), in the dtype of the pass."""
        return [constant(w, self.x.dtype) for w in self.layers.weights]

    @cached_property
    def widths(self) -> list[int]:  # type: ignore[override]
        return [w.shape[0] for w in self.layers.weights]

    @property
    def biases(self) -> Sequence[Tensor | None]:
        """b_i, (n_i,), or None."""
        return self.layers.biases

    @property
    def nonlinearities(self) -> Sequence[Nonlinearity]:
        """φ_i."""
        return self.layers.nonlinearities

    @property
    def output(self) -> Tensor:
        return self.r[-1]

    @cached_property
    def slopes(self) -> list[Tensor]:  # type: ignore[override]
        return [phi.slope(v, r) for phi, v, r in zip(self.nonlinearities, self.v, self.r)]

    @property
    def mean_slopes(self) -> list[Tensor]:
        """The batch mean of the slopes, one (1, n_i) a layer."""
        return [d.mean(0, keepdim=True) for d in self.slopes]

    @property
    def presynaptic(self) -> list[Tensor]:
        return [self.x, *self.r[:-1]]

    @property
    def somata(self) -> Sequence[int]:
        return range(self.depth, 0, -1)

    @property
    def able(self) -> list[Tensor]:
        return [(d != 0).to(d) for d in self.slopes]

    def made_of(self) -> list[Tensor]:
        return [*self.presynaptic, *self.v, *self.weights]

    def samples(self, index: Tensor) -> DensePass:
        unit = None if self.unit is None else Unit(*(each[index] for each in self.unit))
        v, r = ([each[index] for each in several] for several in (self.v, self.r))
        return replace(self, x=self.x[index], v=v, r=r, unit=unit)

    def again(self) -> DensePass:
        return replace(DensePass.run(self.x, self.layers, self.feedback), layered=self.layered, loss=self.loss)

    # The control's way to the output

    @cached_property
    def plain_output(self) -> bool:
        """Whether the output layer is linear and driven by the control itself, Q_L = I."""
        plain = self.feedback and not self.layered and self.unit is None
        if not plain or not isinstance(self.nonlinearities[-1], Identity):
            return False
        q = self.feedback[-1]
        return torch.equal(q, torch.eye(len(q), dtype=q.dtype, device=q.device))

    def _direct(self, u: Tensor) -> list[Tensor]:
        if self.widths[-1] <= WIDE or not self.plain_output:
            return list((u @ self.stacked_feedback.T).split(self.widths, dim=1))
        hidden = self.widths[:-1]
        return [*(u @ self.stacked_feedback[: sum(hidden)].T).split(hidden, dim=1), u]

    def spread(self, ports: Sequence[Tensor]) -> list[Tensor]:
        return list(ports)

    def gathered(self, errors: Sequence[Tensor]) -> list[Tensor]:
        return list(errors)

    def respond(self, driven: Sequence[Tensor]) -> DenseDeviation:
        basal: list[Tensor] = []
        rates: list[Tensor] = []
        for i, (w, phi, a) in enumerate(zip(self.weights, self.nonlinearities, driven)):
            basal.append(rates[-1] @ w.T if i else torch.zeros_like(a))
            rates.append(phi.difference(self.v[i], self.r[i], basal[-1] + a if i else a, self.slopes[i]))
        return DenseDeviation(basal, list(driven), rates)

    def apart(self, driven: Sequence[Tensor]) -> DenseDeviation:
        still = [torch.zeros_like(v) for v in self.v]
        found = [phi.difference(v, r, a) for phi, v, r, a in zip(self.nonlinearities, self.v, self.r, driven)]
        return DenseDeviation(still, list(driven), found)

    # Linearised

    def linear_response(self, driven: Sequence[Tensor]) -> Tensor:
        rates = self.slopes[0] * driven[0]
        for w, d, a in zip(self.weights[1:], self.slopes[1:], driven[1:]):
            rates = d * (rates @ w.T + a)
        return rates

    def pull(
        self,
        error: Tensor,
        through: Sequence[Tensor] | None = None,
        at: DenseDeviation | None = None,
        live: bool = False,
    ) -> list[Tensor]:
        weights = self.weights if through is None else through
        crossed = self._crossing(at)
        found = [crossed(-1, error)]
        for i in range(self.depth - 1, 0, -1):
            found.append(crossed(i - 1, found[-1] @ weights[i]))
        return found[::-1]

    def output_errors(self, error: Tensor) -> list[Tensor | None]:
        return [*[None] * (self.depth - 1), error * self.slopes[-1]]

    def _rows(self, at: DenseDeviation | None = None, through: Sequence[Tensor] | None = None) -> list[Tensor]:
        return jacobians(self.weights if through is None else through, self._slopes_at(at))

    def _direct_gain(self, at: DenseDeviation | None) -> Tensor:
        return output_gain(self.weights, self.feedback, self._slopes_at(at))

    def mean_gain(self) -> Tensor:
        return output_gain(self.weights, self.feedback, self.mean_slopes)

    # Weights alone

    @property
    def hears(self) -> Sequence[bool]:
        return [i > 0 for i in range(self.depth)]

    def layer_weights(self) -> list[Tensor | None]:
        return list(self.weights)

    def passed_on(self, index: int, heard: Tensor) -> Tensor:
        return heard @ self.weights[index].T

    def one_forth(self, changes: Sequence[Tensor]) -> list[Tensor]:
        return [torch.zeros_like(self.x), *(d * c for d, c in zip(self.slopes[:-1], changes))]

    def one_back(self, errors: Sequence[Tensor], through: Sequence[Tensor]) -> list[Tensor]:
        arriving = [e @ w for e, w in zip(errors[1:], through[1:])]
        return [*(d * a for d, a in zip(self.slopes, arriving)), torch.zeros_like(self.v[-1])]

    def correlation(self, index: int, signal: Tensor, heard: Tensor) -> Tensor:
        return signal.T @ heard

    def _crossing(self, at: DenseDeviation | None) -> Callable[[int, Tensor], Tensor]:
        """What an error of a layer's rates is for its voltages."""
        if (reach := self.reach) is None:
            slopes = self._slopes_at(at)
            return lambda i, error: error * slopes[i]
        voltages = self._voltages_at(at)
        return lambda i, error: self.nonlinearities[i].secant(voltages[i], error, reach)

    def _slopes_at(self, at: DenseDeviation | None) -> list[Tensor]:
        if at is None:
            return self.slopes
        return [phi.slope(v, phi(v)) for phi, v in zip(self.nonlinearities, self._voltages_at(at))]

    def _voltages_at(self, at: DenseDeviation | None) -> list[Tensor]:
        if at is None:
            return self.v
        return [v + b + a for v, b, a in zip(self.v, at.basal, at.driven)]

    # Outputs wider than the layer before them

    @property
    def reducible(self) -> bool:
        """Whether the output is wider than the layer before it can move, and :meth:`reduced` saves work."""
        return self.depth > 1 and self.widths[-2] < self.widths[-1] and self.plain_output

    def reduced(self) -> tuple[DensePass, Tensor]:
        """The same network in an orthonormal basis of the range of W_L, in which alone hidden layers move the output.

        With Q_L = I a control in that range keeps the output there, so that dynamics that begin in it stay in it.

        Returns:
            The pass with n_{L−1} outputs, and the basis, (n_L, n_{L−1}).
        """
        basis = torch.linalg.qr(self.weights[-1]).Q
        layers = Layers(
            [*self.weights[:-1], basis.T @ self.weights[-1]], [*self.biases[:-1], None], self.nonlinearities
        )
        feedback = [*(q @ basis for q in self.feedback[:-1]), torch.eye(basis.shape[1]).to(basis)]
        output = self.output @ basis
        return DensePass(layers, feedback, self.x, [*self.v[:-1], output], [*self.r[:-1], output]), basis

    # From activity to updates

    def postsynaptic(self, deviation: DenseDeviation, plasticity: Plasticity) -> list[Tensor]:
        if plasticity == "voltage_difference":
            return list(deviation.driven)
        if plasticity == "derivative":
            return [slope * drive for slope, drive in zip(self.slopes, deviation.driven)]
        found = [deviation.rates[0]]  # nothing upstream of the first layer moves: v_1^ff is the feedforward voltage
        for i in range(1, self.depth):
            phi, v, r, slope = self.nonlinearities[i], self.v[i], self.r[i], self.slopes[i]
            if deviation.delayed:
                at = v + deviation.basal[i]
                found.append(phi.difference(at, phi(at), deviation.driven[i]))
            else:
                found.append(deviation.rates[i] - phi.difference(v, r, deviation.basal[i], slope))
        return found

    def basal_drive(self, deviation: DenseDeviation) -> list[Tensor]:
        basal = [v + moved for v, moved in zip(self.v, deviation.basal)]
        return [v if b is None else v - constant(b, v.dtype) for v, b in zip(basal, self.biases)]

    def heard(self, deviation: DenseDeviation) -> list[Tensor]:
        return [self.x, *(r + dr for r, dr in zip(self.r[:-1], deviation.rates[:-1]))]

    def gradients(
        self, signals: Sequence[Tensor], heard: Sequence[Tensor] | None = None, scale: float = 1.0
    ) -> list[list[Tensor]]:
        share, found = scale / self.batch_size, []
        for t, r, bias in zip(signals, self.presynaptic if heard is None else heard, self.biases):
            weight = (t * share).T @ r
            found.append([weight] if bias is None else [weight, t.sum(0) * share])
        return found


@singledispatch
def as_dense(forward: ForwardPass, what: str, instead: str) -> DensePass:
    """``forward``, if it is one of a chain.

    Raises:
        ControlError: it is not; the message says ``what`` is for chains, and what to do ``instead``.
    """
    raise ControlError(
        f"{what} is known for chains of dense layers with elementwise functions between them, which this network is "
        f"not. {instead}"
    )


@as_dense.register
def _(forward: DensePass, what: str, instead: str) -> DensePass:
    return forward
