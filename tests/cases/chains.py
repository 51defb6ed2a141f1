"""Networks × losses × data in float64, and dense oracles that know a chain only by its forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jacrev, vmap

from dfc_lightning.operations.nonlinearity import Elementwise, Identity, LeakyReLU, Nonlinearity, ReLU, Sigmoid, Tanh
from dfc_lightning.passes import DensePass, Layers
from dfc_lightning.rules import Update

Net = tuple[tuple[int, ...], str, str]

PHI: dict[str, tuple[Nonlinearity, Callable[[Tensor], Tensor]]] = {
    "linear": (Identity(), lambda v: v),
    "tanh": (Tanh(), torch.tanh),
    "sigmoid": (Sigmoid(), torch.sigmoid),
    "relu": (ReLU, torch.relu),
    "leaky_relu": (LeakyReLU(0.1), lambda v: F.leaky_relu(v, 0.1)),
    "softplus": (Elementwise(F.softplus), F.softplus),
}
"""Nonlinearities and, beside each, the torch function it stands for."""

NETWORKS: dict[str, Net] = {
    "linear": ((6, 5, 4, 3), "linear", "squared"),
    "tanh": ((6, 5, 4, 3), "tanh", "squared"),
    "tanh_ce": ((20, 16, 16, 10), "tanh", "cross_entropy"),
    "relu": ((6, 5, 4, 3), "relu", "squared"),
    "leaky_relu": ((6, 5, 4, 3), "leaky_relu", "squared"),
    "sigmoid": ((6, 5, 4, 3), "sigmoid", "squared"),
    "softplus": ((6, 5, 4, 3), "softplus", "cross_entropy"),
    "one_layer": ((6, 3), "tanh", "cross_entropy"),
    "one_output": ((6, 5, 4, 1), "tanh", "squared"),
}
"""Widths n_0 … n_L, hidden nonlinearity (the output is linear), loss."""


@dataclass(frozen=True)
class Case:
    """A chain, a batch, and the loss of each sample."""

    layers: Layers
    feedback: Sequence[Tensor]
    hidden: str
    x: Tensor
    y: Tensor
    loss: str

    @cached_property
    def forward(self) -> DensePass:
        return DensePass.run(self.x, self.layers, self.feedback)

    @property
    def widths(self) -> list[int]:
        """n_1 … n_L."""
        return [len(w) for w in self.layers.weights]

    @cached_property
    def loss_grad(self) -> Tensor:
        """∂ℓ_b/∂r_L by autograd."""
        output = self.output().requires_grad_()
        return torch.autograd.grad(self.losses(output).sum(), output)[0]

    def losses(self, output: Tensor) -> Tensor:
        """ℓ_b of each sample, (B,)."""
        if self.loss == "cross_entropy":
            return F.cross_entropy(output, self.y, reduction="none")
        return 0.5 * (output - self.y).square().sum(1)

    def output(self, *args: Any, **kwargs: Any) -> Tensor:
        """r_L by a plain forward pass; arguments as for :meth:`rates`."""
        return self.rates(*args, **kwargs)[-1]

    def rates(
        self, pushes: Sequence[Tensor] | None = None, parameters: Any = None, x: Tensor | None = None
    ) -> list[Tensor]:
        """r_1 … r_L with ``pushes`` added to the voltages, with other weights and biases, for another input."""
        weights, biases = parameters or self.layers[:2]
        rates = [self.x if x is None else x]
        for i, (w, b) in enumerate(zip(weights, biases)):
            v = rates[-1] @ w.T + b + (pushes[i] if pushes is not None else 0.0)
            rates.append(PHI[self.hidden][1](v) if i < len(weights) - 1 else v)
        return rates[1:]

    @cached_property
    def jacobian(self) -> Tensor:
        """J = ∂r_L/∂[v_1 … v_L] of each sample by torch.func, (B, n_L, Σ n_i)."""
        still = torch.zeros(sum(self.widths), dtype=self.x.dtype)
        of_push = jacrev(lambda push, x: self.output(push.split(self.widths), x=x))
        return vmap(of_push, (None, 0))(still, self.x)

    @property
    def gain(self) -> Tensor:
        """JQ of each sample from the dense Jacobian, (B, n_L, n_L)."""
        return self.jacobian @ torch.cat(list(self.feedback))

    def with_feedback(self, stacked: Tensor) -> Case:
        """The same with other feedback weights, given one above the other."""
        return replace(self, feedback=stacked.split(self.widths))

    def only(self, index: Tensor | slice) -> Case:
        """The same with some samples only."""
        return replace(self, x=self.x[index], y=self.y[index])

    def to(self, dtype: torch.dtype) -> Case:
        """The same in another dtype."""
        weights, biases, phi = self.layers
        w, b, q = ([t.to(dtype) for t in layers] for layers in (weights, biases, self.feedback))
        y = self.y.to(dtype) if self.y.is_floating_point() else self.y
        return replace(self, layers=Layers(w, b, phi), feedback=q, x=self.x.to(dtype), y=y)


def make(name: str | Net, feedback: str = "weight_product", batch: int = 5, seed: int = 0) -> Case:
    """A seeded case, by a name of ``NETWORKS`` or by widths, nonlinearity and loss.

    ``feedback``: "weight_product"; "random" with Q_L = I; "unruly", random in the output layer too; "pseudoinverse"
    of the first sample's J, and "mixed", its Jᵀ M with a random M.
    """
    sizes, hidden, loss = NETWORKS[name] if isinstance(name, str) else name
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    weights = [normal(n, m) * (2 / (n + m)) ** 0.5 for m, n in zip(sizes, sizes[1:])]
    biases = [0.3 * normal(n) for n in sizes[1:]]
    x, last = normal(batch, sizes[0]), sizes[-1]
    y = torch.randint(last, (batch,), generator=g) if loss == "cross_entropy" else normal(batch, last)
    product = [torch.eye(last, dtype=torch.float64)]
    for w in reversed(weights[1:]):
        product.insert(0, w.T @ product[0])
    phi = [PHI[hidden][0]] * (len(weights) - 1) + [Identity()]
    case = Case(Layers(weights, biases, phi), product, hidden, x, y, loss)
    if feedback == "weight_product":
        return case
    if feedback in ("random", "unruly"):
        noise = [normal(n, last) * (2 / (n + last)) ** 0.5 for n in sizes[1:]]
        return case.with_feedback(torch.cat(noise if feedback == "unruly" else [*noise[:-1], product[-1]]))
    jacobian = case.jacobian[0]
    mixer = torch.linalg.inv(jacobian @ jacobian.T) if feedback == "pseudoinverse" else normal(last, last)
    return case.with_feedback(jacobian.T @ mixer)


def flat(update: Update) -> Tensor:
    """All weight and bias changes in one vector, weights first."""
    return torch.cat([t.flatten() for t in [*update.weights, *update.biases]])


def degrees(a: Tensor, b: Tensor) -> float:
    """The angle between two tensors, accurate near 0 as well."""
    a, b = a.flatten() / a.norm(), b.flatten() / b.norm()
    return float(torch.rad2deg(2 * torch.atan2((a - b).norm(), (a + b).norm())))


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """‖a − b‖ ≤ tolerance · ‖b‖; never true of a NaN."""
    return bool((a - b).norm() <= tolerance * b.norm())
