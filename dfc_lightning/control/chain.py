"""A chain of linear layers and elementwise nonlinearities under control, in deviations from feedforward.

Feedforward, v_i⁻ = W_i r_{i−1}⁻ + b_i and r_i⁻ = φ(v_i⁻). With a control signal u the layers hold
δv_i = δv_i^ff + a_i: basal deviation δv_i^ff = W_i δr_{i−1} and apical voltage a_i = Q_i u. Working with the
deviations, W_1 x and all biases drop out and float32 keeps its digits however small u is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from dfc_lightning.control.nonlinearity import Identity, Nonlinearity
from dfc_lightning.control.plasticity import Plasticity

WIDE = 64
"""Outputs from which on an identity Q_L is worth looking for."""


@dataclass
class Activity:
    """One feedforward pass over a batch of B samples.

    Args:
        x: the network's input r_0, (B, n_0).
        v: feedforward voltages v_i⁻, one (B, n_i) a layer.
        r: feedforward rates r_i⁻ = φ(v_i⁻), likewise.
        nonlinearities: φ of each layer.
    """

    x: Tensor
    v: list[Tensor]
    r: list[Tensor]
    nonlinearities: Sequence[Nonlinearity]

    @property
    def batch_size(self) -> int:
        """B."""
        return self.x.shape[0]

    @property
    def output(self) -> Tensor:
        """The feedforward output r_L⁻, (B, n_L)."""
        return self.r[-1]

    @cached_property
    def slopes(self) -> list[Tensor]:
        """D_i = φ'(v_i⁻), one (B, n_i) a layer."""
        return [phi.slope(v, r) for phi, v, r in zip(self.nonlinearities, self.v, self.r)]

    def presynaptic(self) -> list[Tensor]:
        """r_{i−1}⁻ of each layer i, the first being x."""
        return [self.x, *self.r[:-1]]

    def samples(self, index: Tensor) -> Activity:
        """The activity of some samples only; ``index`` as for a tensor's first dimension."""
        return Activity(self.x[index], [v[index] for v in self.v], [r[index] for r in self.r], self.nonlinearities)


class Response(NamedTuple):
    """How the controlled network deviates from feedforward; one (B, n_i) a layer in each list."""

    basal: list[Tensor]
    """δv_i^ff = W_i δr_{i−1}, what the layer's own input drives it to."""
    driven: list[Tensor]
    """δv_i − δv_i^ff, what the feedback drives it to beyond that: settled, the apical voltage Q_i u."""
    rates: list[Tensor]
    """δr_i = φ(v_i⁻ + δv_i) − φ(v_i⁻)."""

    delayed: bool = False
    """Whether the rates are those of earlier voltages than these, transmission being delayed."""

    @property
    def output(self) -> Tensor:
        """δr_L, (B, n_L)."""
        return self.rates[-1]

    def where(self, keep: Tensor, other: Response | None = None) -> Response:
        """This response for the samples of the mask ``keep``, (B,); ``other``, or no deviation, for the rest."""
        mask = keep.unsqueeze(1)

        def choose(mine: list[Tensor], others: list[Tensor] | None) -> list[Tensor]:
            if others is None:
                return [torch.where(mask, each, torch.zeros_like(each)) for each in mine]
            return [torch.where(mask, each, another) for each, another in zip(mine, others)]

        return Response(
            choose(self.basal, other and other.basal),
            choose(self.driven, other and other.driven),
            choose(self.rates, other and other.rates),
            self.delayed,
        )


class Chain:
    """Weights, nonlinearities and feedback weights of a controlled chain, and its closed forms.

    Args:
        weights: W_i, (n_i, n_{i−1}).
        biases: b_i, (n_i,), or None.
        nonlinearities: φ_i; the last layer's is the identity unless the network has it otherwise.
        feedback: Q_i, (n_i, n_L).
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        nonlinearities: Sequence[Nonlinearity],
        feedback: Sequence[Tensor],
    ) -> None:
        self.weights = list(weights)
        self.biases = list(biases)
        self.nonlinearities = list(nonlinearities)
        self.feedback = list(feedback)
        self.widths = [w.shape[0] for w in self.weights]

    @property
    def depth(self) -> int:
        """L."""
        return len(self.weights)

    def feedforward(self, x: Tensor) -> Activity:
        """The feedforward pass of input ``x``, (B, n_0)."""
        voltages: list[Tensor] = []
        rates: list[Tensor] = []
        for w, b, phi in zip(self.weights, self.biases, self.nonlinearities):
            voltages.append(torch.nn.functional.linear(rates[-1] if rates else x, w, b))
            rates.append(phi(voltages[-1]))
        return Activity(x, voltages, rates, self.nonlinearities)

    def repeat(self, activity: Activity) -> Activity:
        """The feedforward pass of the same input with the weights as they are now."""
        return self.feedforward(activity.x)

    def made_of(self, activity: Activity) -> list[Tensor]:
        """The tensors that an update is made of."""
        return [*activity.presynaptic(), *activity.v, *self.weights]

    # The control's way to the output

    @cached_property
    def stacked_feedback(self) -> Tensor:
        """All Q_i one above the other, (Σ n_i, n_L)."""
        return torch.cat(self.feedback)

    @cached_property
    def plain_output(self) -> bool:
        """Whether the output layer is linear and driven by the control itself, Q_L = I."""
        q = self.feedback[-1]
        linear = isinstance(self.nonlinearities[-1], Identity)
        return linear and torch.equal(q, torch.eye(len(q), dtype=q.dtype, device=q.device))

    def apical(self, u: Tensor) -> list[Tensor]:
        """Apical voltages Q_i u of a control signal ``u``, (B, n_L)."""
        if self.widths[-1] <= WIDE or not self.plain_output:
            return list((u @ self.stacked_feedback.T).split(self.widths, dim=1))
        hidden = self.widths[:-1]
        return [*(u @ self.stacked_feedback[: sum(hidden)].T).split(hidden, dim=1), u]

    def respond(self, activity: Activity, apical: Sequence[Tensor]) -> Response:
        """The controlled feedforward pass: v_i = W_i r_{i−1} + b_i + a_i, layer after layer."""
        basal: list[Tensor] = []
        rates: list[Tensor] = []
        slopes = activity.slopes
        for i, (w, phi, a) in enumerate(zip(self.weights, self.nonlinearities, apical)):
            basal.append(rates[-1] @ w.T if i else torch.zeros_like(a))
            rates.append(phi.difference(activity.v[i], activity.r[i], basal[-1] + a if i else a, slopes[i]))
        return Response(basal, list(apical), rates)

    def apart(self, activity: Activity, apical: Sequence[Tensor]) -> Response:
        """What apical voltages do to each layer alone, what it hears staying feedforward."""
        still = [torch.zeros_like(v) for v in activity.v]
        found = [phi.difference(v, r, a) for phi, v, r, a in zip(self.nonlinearities, activity.v, activity.r, apical)]
        return Response(still, list(apical), found)

    def linear_response(self, at: Activity | Sequence[Tensor], apical: Sequence[Tensor]) -> Tensor:
        """First-order output deviation Σ_i J_i a_i, (B, n_L), at an activity's slopes or at given ones."""
        slopes = _slopes(at)
        rates = slopes[0] * apical[0]
        for w, d, a in zip(self.weights[1:], slopes[1:], apical[1:]):
            rates = d * (rates @ w.T + a)
        return rates

    def output_gain(self, at: Activity | Sequence[Tensor], response: Response | None = None) -> Tensor:
        """JQ = Σ_i J_i Q_i, (B, n_L, n_L), by K_1 = Q_1, K_i = Q_i + W_i D_{i−1} K_{i−1}, JQ = D_L K_L.

        The n_L columns of K ride through each layer as rows of the batch.

        Args:
            at: the activity to linearise at, or its slopes.
            response: take the slopes at this controlled deviation from the activity instead.
        """
        slopes = _slopes(at)
        if response is not None:
            assert isinstance(at, Activity)
            voltages = [v + b + a for v, b, a in zip(at.v, response.basal, response.driven)]
            slopes = [phi.slope(v, phi(v)) for phi, v in zip(self.nonlinearities, voltages)]
        columns = self._columns(slopes, self.depth)
        return (columns * slopes[-1].unsqueeze(1)).transpose(1, 2)

    def mean_gain(self, activity: Activity) -> Tensor:
        """JQ with batch-mean slopes, (1, n_L, n_L)."""
        return self.output_gain([d.mean(0, keepdim=True) for d in activity.slopes])

    def hidden_gain(self, slopes: Sequence[Tensor]) -> Tensor:
        """N = D_{L−1} K_{L−1}, (B, n_{L−1}, n_L): what a unit of control makes of the rates before the output layer."""
        columns = self._columns(slopes, self.depth - 1)
        return (columns * slopes[-2].unsqueeze(1)).transpose(1, 2)

    def _columns(self, slopes: Sequence[Tensor], layers: int) -> Tensor:
        """K of layer number ``layers``, transposed, (B, n_L, n)."""
        columns = self.feedback[0].T.expand(slopes[0].shape[0], -1, -1)
        for w, q, d in zip(self.weights[1:layers], self.feedback[1:], slopes):
            columns = torch.matmul(columns * d.unsqueeze(1), w.T).add_(q.T)
        return columns

    def jacobians(self, at: Activity | Sequence[Tensor]) -> list[Tensor]:
        """J_i = ∂r_L/∂v_i, one (B, n_L, n_i) a layer: J_L = D_L, J_i = J_{i+1} W_{i+1} D_i."""
        slopes = _slopes(at)
        product = torch.diag_embed(slopes[-1])
        found = [product]
        for w, d in zip(reversed(self.weights[1:]), reversed(slopes[:-1])):
            product = torch.matmul(product, w).mul_(d.unsqueeze(1))
            found.append(product)
        return found[::-1]

    def errors(self, at: Activity | Sequence[Tensor], output_error: Tensor, live: bool = False) -> list[Tensor]:
        """Backpropagated errors J_iᵀ e, one (B, n_i) a layer, of an output error e, (B, n_L).

        ``live`` is for networks with batch statistics; a chain has none.
        """
        slopes = _slopes(at)
        error = output_error * slopes[-1]
        found = [error]
        for w, d in zip(reversed(self.weights[1:]), reversed(slopes[:-1])):
            error = (error @ w) * d
            found.append(error)
        return found[::-1]

    @property
    def reducible(self) -> bool:
        """Whether the output is wider than the layer before it can move, and :meth:`reduced` saves work."""
        return self.depth > 1 and self.widths[-2] < self.widths[-1] and self.plain_output

    def reduced(self, activity: Activity) -> tuple[Chain, Activity, Tensor]:
        """The same network in an orthonormal basis of the range of W_L, in which alone hidden layers move the output.

        With Q_L = I a control in that range keeps the output there, so that dynamics that begin in it stay in it.

        Returns:
            The chain and the activity with n_{L−1} outputs, and the basis, (n_L, n_{L−1}).
        """
        basis = torch.linalg.qr(self.weights[-1]).Q
        chain = Chain(
            [*self.weights[:-1], basis.T @ self.weights[-1]],
            [*self.biases[:-1], None],
            self.nonlinearities,
            [*(q @ basis for q in self.feedback[:-1]), torch.eye(basis.shape[1]).to(basis)],
        )
        output = activity.output @ basis
        same = Activity(activity.x, [*activity.v[:-1], output], [*activity.r[:-1], output], self.nonlinearities)
        return chain, same, basis

    # From activity to updates

    def spread(self, ports: Sequence[Tensor]) -> list[Tensor]:
        """Apical voltages in the shape of the layers' voltages: what they are."""
        return list(ports)

    def postsynaptic(self, activity: Activity, response: Response, plasticity: Plasticity) -> list[Tensor]:
        """What the feedback changed in each layer, one (B, n_i) a layer; see :data:`Plasticity`."""
        if plasticity == "voltage_difference":
            return list(response.driven)
        if plasticity == "derivative":
            return [slope * drive for slope, drive in zip(activity.slopes, response.driven)]
        found = [response.rates[0]]  # nothing upstream of the first layer moves: v_1^ff is the feedforward voltage
        for i in range(1, self.depth):
            phi, v, r, slope = self.nonlinearities[i], activity.v[i], activity.r[i], activity.slopes[i]
            if response.delayed:
                at = v + response.basal[i]
                found.append(phi.difference(at, phi(at), response.driven[i]))
            else:
                found.append(response.rates[i] - phi.difference(v, r, response.basal[i], slope))
        return found

    def presynaptic(self, activity: Activity, response: Response) -> list[Tensor]:
        """The controlled rates r_{i−1} each layer i hears, the first being the input x."""
        return [activity.x, *(r + dr for r, dr in zip(activity.r[:-1], response.rates[:-1]))]

    def update(
        self, activity: Activity, signals: Sequence[Tensor], heard: Sequence[Tensor], scale: float
    ) -> list[list[Tensor]]:
        """``scale`` · Σ_b t_i r_{i−1}ᵀ and ``scale`` · Σ_b t_i: what a layer's weight and bias are taught.

        Args:
            activity: the feedforward pass.
            signals: postsynaptic factors t_i.
            heard: presynaptic factors r_{i−1}.
            scale: of both.
        """
        return [list(pair) for pair in zip(*self.outer(signals, heard, scale))]

    def outer(
        self, signals: Sequence[Tensor], presynaptic: Sequence[Tensor], scale: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        """``scale`` · Σ_b t_i r_{i−1}ᵀ and ``scale`` · Σ_b t_i: a layer's weight and bias gradients."""
        weights = [(t * scale).T @ r for t, r in zip(signals, presynaptic)]
        return weights, [t.sum(0) * scale for t in signals]


def _slopes(at: Activity | Sequence[Tensor]) -> Sequence[Tensor]:
    return at.slopes if isinstance(at, Activity) else at
