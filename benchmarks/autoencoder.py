"""What bounds DFC on the autoencoder? Validation loss by epoch, with exact Jacobians in place of learned feedback.

The network of ``recipes/mnist_autoencoder`` learns on MNIST, by the optimizer and the schedule of ``dfc_best``, from
the signals

- of backprop, J_iᵀ δ, of each sample's own Jacobians J_i = ∂output/∂v_i;
- of the damped minimum norm, J_iᵀ (JJᵀ + γI)⁻¹ δ, to which DFC comes with ideal feedback weights (Theorem 3) and a
  leakage that stands for γ: backprop again, but for its scale, as γ → ∞;
- of leaky DFC whose feedback weights are the mean over the batch of J_iᵀ, exact and without a lag.

What tells the third from the first is that feedback weights are one for all samples, where J_1 and J_2 vary by sample
with the slope of the third layer; what tells the second from the first is the rule.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import harness
import torch
from problems import RECIPES
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from dfc_lightning.data import MNIST
from dfc_lightning.experiments.composition import compose
from dfc_lightning.models import MLP

Signals = Callable[[list[Tensor], list[Tensor], Tensor], list[Tensor]]
"""Of the weights, the slopes of layers 1 and 3 and δ, (B, n_L): what layers 1 to 3 are taught, (B, n_i), then δ's."""


def backprop(weights: list[Tensor], slopes: list[Tensor], delta: Tensor) -> list[Tensor]:
    """J_iᵀ δ."""
    third = delta @ weights[3] * slopes[1]
    second = third @ weights[2]
    return [second @ weights[1] * slopes[0], second, third, delta]


def shared(weights: list[Tensor], slopes: list[Tensor], delta: Tensor) -> list[Tensor]:
    """The mean of J_iᵀ applied to δ, and gated by a unit's own slope, as a difference of rates is."""
    third = weights[3] * slopes[1].mean(0)
    second = third @ weights[2]
    first = second @ weights[1]
    return [delta @ first * slopes[0], delta @ second, delta @ weights[3] * slopes[1], delta]


def minimum_norm(damping: float) -> Signals:
    """(1 + γ) J_iᵀ (JJᵀ + γI)⁻¹ δ: in that scale that of backprop as γ → ∞."""

    def signals(weights: list[Tensor], slopes: list[Tensor], delta: Tensor) -> list[Tensor]:
        basis, small = torch.linalg.qr(weights[3])  # hidden layers move the output in its range alone
        third = small * slopes[1].unsqueeze(1)
        second = third @ weights[2]
        inner = torch.eye(len(weights[1])).to(small) + (weights[1] * slopes[0].unsqueeze(1) ** 2) @ weights[1].T
        gram = third @ third.mT + second @ inner @ second.mT  # of the hidden layers; J_L = I
        gram.diagonal(dim1=1, dim2=2).add_(1 + damping)
        within = delta @ basis
        factor, _ = torch.linalg.cholesky_ex(gram)
        solved = torch.cholesky_solve(within.unsqueeze(2), factor).squeeze(2) * (1 + damping)
        return backprop(weights, slopes, delta + (solved - within) @ basis.T)

    return signals


def trained(signals: Signals, settings: dict[str, Any], epochs: int, options: Any) -> tuple[list[float], float]:
    """Validation losses by epoch, and the seconds an epoch."""
    torch.manual_seed(0)
    module = MLP(**settings["network"]["init_args"]).to(options.device, options.dtype)
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    optimizer = torch.optim.Adam(module.parameters(), **settings["optimizer"]["init_args"])
    scheduler = CosineAnnealingLR(optimizer, **settings["scheduler"]["init_args"])
    data = MNIST(batch_size=options.batch)
    data.prepare_data()
    data.setup("fit")
    losses: list[float] = []
    start = time.perf_counter()

    def rates(x: Tensor) -> list[Tensor]:
        r = [x.flatten(1).to(options.device, options.dtype)]
        for layer, curved in zip(layers, (True, False, True, False)):
            v = layer(r[-1])
            r.append(torch.tanh(v) if curved else v)
        return r

    with torch.no_grad():
        for _ in range(epochs):
            for k, (x, _) in enumerate(data.train_dataloader()):
                if k == options.batches:
                    break
                r = rates(x)
                delta = (r[4] - r[0]) * 2 / r[0].numel()
                taught = signals([layer.weight for layer in layers], [1 - r[1] ** 2, 1 - r[3] ** 2], delta)
                for layer, signal, before in zip(layers, taught, r):
                    layer.weight.grad, layer.bias.grad = signal.T @ before, signal.sum(0)
                optimizer.step()
            scheduler.step()
            errors = [((r[4] - r[0]) ** 2).mean(1) for r in (rates(x) for x, _ in data.val_dataloader())]
            losses.append(float(torch.cat(errors).mean()))
    return losses, (time.perf_counter() - start) / epochs


def main(argv: Sequence[str] | None = None) -> None:
    """Train, print, write."""
    parser = harness.arguments(__doc__, repeats=1)
    parser.add_argument("--batch", default=128, type=int, help="batch size")
    parser.add_argument("--batches", default=10**9, type=int, help="batches an epoch, at most")
    parser.add_argument("--epochs", default=25, type=int, help="epochs of backprop and of shared feedback")
    parser.add_argument("--short", default=2, type=int, help="epochs of the minimum norm, which costs most")
    parser.add_argument("--damping", default=[0.0, 1.0, 10.0], type=float, nargs="*", help="γ of the minimum norm")
    options = harness.parse(parser, argv)
    settings = compose(RECIPES / "mnist_autoencoder" / "dfc_best.yaml")["model"]["init_args"]
    runs: dict[str, tuple[Signals, int]] = {
        "backprop": (backprop, options.epochs),
        "shared feedback": (shared, options.epochs),
    }
    runs |= {f"minimum norm, γ = {d:g}": (minimum_norm(d), options.short) for d in options.damping}
    found = {name: trained(signals, settings, epochs, options) for name, (signals, epochs) in runs.items()}
    shown = sorted({min(k, options.epochs) for k in (1, 2, 5, 10, 15, 20, 25)})
    rows = [
        (name, *(losses[k - 1] if k <= len(losses) else None for k in shown), seconds)
        for name, (losses, seconds) in found.items()
    ]
    header = ("update", *(f"epoch {k}" for k in shown), "s an epoch")
    curves = {name: losses for name, (losses, _) in found.items()}
    harness.report("autoencoder", options, {"validation": curves}, harness.table(header, rows))

    def draw(axes: Any) -> None:
        for name, losses in curves.items():
            axes.plot(range(1, len(losses) + 1), losses, marker=".", label=name)
        axes.set(xlabel="epoch", ylabel="validation loss", yscale="log")
        axes.legend(frameon=False)

    harness.figure("autoencoder", options, 1, 1, draw)


if __name__ == "__main__":
    main()
