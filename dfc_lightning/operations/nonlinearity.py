"""Elementwise nonlinearities: value, slope, and differences that keep their digits.

A teaching signal is a difference φ(v + d) − φ(v) with d some 1e-4 of v. Subtracting two float32
numbers would lose half their digits, so every nonlinearity brings a form of the difference whose
relative error is that of d itself; the generic fall-back subtracts in float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Where d − d³/3 is tanh d to the last digit.
_CUBIC = {torch.float32: 0.02, torch.float64: 1e-4}


class Nonlinearity(ABC):
    """An elementwise function φ from voltages to firing rates, both of shape (B, n)."""

    @abstractmethod
    def __call__(self, v: Tensor) -> Tensor:
        """Rates r = φ(v)."""

    @abstractmethod
    def slope(self, v: Tensor, r: Tensor) -> Tensor:
        """Derivative φ'(v), given also r = φ(v)."""

    def difference(self, v: Tensor, r: Tensor, d: Tensor, slope: Tensor | None = None) -> Tensor:
        """φ(v + d) − φ(v) with the relative accuracy of ``d``.

        Args:
            v: voltages.
            r: their rates φ(v).
            d: what is added to the voltages.
            slope: φ'(v), where it is at hand.
        """
        wide = v.double()
        return (self(wide + d.double()) - self(wide)).to(v.dtype)

    def secant(self, v: Tensor, e: Tensor, reach: tuple[float, float]) -> Tensor:
        """[φ(v + β⁺ e) − φ(v − β⁻ e)] / (β⁺ + β⁻), φ'(v) e for small β, with the relative accuracy of ``e``.

        Args:
            v: voltages.
            e: errors of the rates.
            reach: β⁻ and β⁺.
        """
        width = sum(reach)
        below = v - reach[0] * e
        return self.difference(below, self(below), width * e) / width


@dataclass(frozen=True)
class Identity(Nonlinearity):
    """φ(v) = v."""

    def __call__(self, v: Tensor) -> Tensor:
        return v

    def slope(self, v: Tensor, r: Tensor) -> Tensor:
        return torch.ones_like(v)

    def difference(self, v: Tensor, r: Tensor, d: Tensor, slope: Tensor | None = None) -> Tensor:
        return d


@dataclass(frozen=True)
class Tanh(Nonlinearity):
    """φ(v) = tanh v; the difference is tanh(d)(1 − r²) / (1 + r tanh d)."""

    def __call__(self, v: Tensor) -> Tensor:
        return torch.tanh(v)

    def slope(self, v: Tensor, r: Tensor) -> Tensor:
        tail = torch.exp(-2 * v.abs())  # 1 − r² has no digits left where the unit is saturated
        return 4 * tail / (1 + tail).square()

    def difference(self, v: Tensor, r: Tensor, d: Tensor, slope: Tensor | None = None) -> Tensor:
        gain = self.slope(v, r) if slope is None else slope
        # On the CPU a look at the largest d is free, and mostly saves transcendental functions.
        look = d.device.type == "cpu" and d.numel() and not torch.compiler.is_compiling()
        largest = float(d.abs().amax()) if look else torch.inf
        if largest < _CUBIC[d.dtype]:
            t = d * d
            torch.addcmul(d, t, d, value=-1 / 3, out=t)
        else:
            t = torch.tanh(d)
        below = torch.addcmul(d.new_ones(()), r, t)
        small = t.mul_(gain).div_(below)
        if largest < 1:
            return small
        # Saturated units driven back hard make 1 + r tanh(d) vanish: there the plain difference is exact enough.
        return torch.where(d.abs() < 1, small, torch.tanh(v + d) - r)


@dataclass(frozen=True)
class Sigmoid(Nonlinearity):
    """φ(v) = 1 / (1 + e^−v) = (1 + tanh(v/2)) / 2."""

    def __call__(self, v: Tensor) -> Tensor:
        return torch.sigmoid(v)

    def slope(self, v: Tensor, r: Tensor) -> Tensor:
        return 0.25 * Tanh().slope(0.5 * v, r)

    def difference(self, v: Tensor, r: Tensor, d: Tensor, slope: Tensor | None = None) -> Tensor:
        return 0.5 * Tanh().difference(0.5 * v, torch.tanh(0.5 * v), 0.5 * d, None if slope is None else 4 * slope)


@dataclass(frozen=True)
class LeakyReLU(Nonlinearity):
    """φ(v) = v for v > 0, else ``negative_slope`` · v; ReLU with the slope 0."""

    negative_slope: float = 0.01

    def __call__(self, v: Tensor) -> Tensor:
        return F.leaky_relu(v, self.negative_slope) if self.negative_slope else torch.relu(v)

    def slope(self, v: Tensor, r: Tensor) -> Tensor:
        above = (v > 0).to(v)
        return above.mul_(1 - self.negative_slope).add_(self.negative_slope) if self.negative_slope else above

    def difference(self, v: Tensor, r: Tensor, d: Tensor, slope: Tensor | None = None) -> Tensor:
        # Piece by piece: the part of the way from v to v + d that lies above zero, and the part below.
        positive = torch.relu(v) if self.negative_slope else r
        negative = v - positive
        above = torch.maximum(negative + d, -positive)
        if not self.negative_slope:
            return above
        below = torch.minimum(positive + d, -negative)
        return above.add_(below, alpha=self.negative_slope)


@dataclass(frozen=True)
class Clamp(Nonlinearity):
    """φ(v) = v within [``low``, ``high``], and its nearer end beyond: hardtanh, ReLU6."""

    low: float
    high: float

    def __call__(self, v: Tensor) -> Tensor:
        return v.clamp(self.low, self.high)

    def slope(self, v: Tensor, r: Tensor) -> Tensor:
        return ((v > self.low) & (v < self.high)).to(v)

    def difference(self, v: Tensor, r: Tensor, d: Tensor, slope: Tensor | None = None) -> Tensor:
        return torch.clamp(d + (v - r), self.low - r, self.high - r)  # v − r is zero within, to the last digit


@dataclass(frozen=True)
class Elementwise(Nonlinearity):
    """Any other elementwise function, known only by its values.

    Args:
        function: maps a tensor to one of the same shape, entry by entry.
    """

    function: Callable[[Tensor], Tensor]

    def __call__(self, v: Tensor) -> Tensor:
        return self.function(v)

    def slope(self, v: Tensor, r: Tensor) -> Tensor:
        with torch.enable_grad():
            v = v.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.function(v).sum(), v)
        return slope


ReLU = LeakyReLU(0.0)
"""φ(v) = max(v, 0)."""
