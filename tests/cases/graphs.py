"""Small networks that are no chains, in float64, and an oracle that knows them only by running them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import jacrev

from dfc_lightning import ControlledNetwork


class Plain(nn.Module):
    """Conv, ReLU, pooling by maxima in overlapping windows, strides, groups, then dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(2, 4, 3, padding=1)
        self.c2 = nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2)
        self.fc1, self.fc2 = nn.Linear(54, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.c1(x)), 3, stride=1, padding=1)
        x = F.relu(self.c2(x), inplace=True)
        return self.fc2(torch.tanh(self.fc1(x.view(x.size(0), -1))))


class Residual(nn.Module):
    """Batch normalisation, a sum of branches with its nonlinearity after it, and a strided shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.c2, self.b2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.c3, self.b3 = nn.Conv2d(4, 4, 1, stride=2, bias=False), nn.BatchNorm2d(4)
        self.c4 = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.b1(self.c1(x)))
        o = self.b2(self.c2(h))
        o += h
        o = F.silu(o)
        o = F.relu(self.c4(o) + self.b3(self.c3(o)))
        return self.fc(F.adaptive_avg_pool2d(o, 1).flatten(1))


class Mixed(nn.Module):
    """Group and layer normalisation, concatenation, a product of branches, two heads summed, maps of one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.g1 = nn.Conv1d(2, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.up = nn.ConvTranspose1d(4, 2, 2, stride=2)
        self.a, self.n, self.b = nn.Linear(34, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        self.gate, self.side = nn.Linear(34, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.elu(self.g1(self.c1(x)))
        h = torch.cat([F.avg_pool1d(torch.sigmoid(self.up(h)), 2).flatten(1), x.mean(1), h.amax(1), h[:, 0, :2]], dim=1)
        a = torch.tanh(self.n(self.a(h)))
        return self.b(a * torch.sigmoid(self.gate(h))) - 0.5 * self.side(F.softplus(a))


class PreNorm(nn.Module):
    """A normalisation before its layer, standing by itself, and voltages with positions, (B, T, n)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x.flatten(1).reshape(-1, 3, 5))
        h = h + self.outer(torch.relu(self.norm(h)))
        return self.head(h.mean(1))


class ConvHead(nn.Module):
    """The network's output is pooled from the maps of its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(F.adaptive_avg_pool2d(self.c2(F.leaky_relu(self.c1(x), 0.2)), 1).flatten(1), dim=1)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (Plain, (2, 6, 6)),
    "residual": (Residual, (2, 6, 6)),
    "mixed": (Mixed, (2, 8)),
    "pre-norm": (PreNorm, (15,)),
    "conv head": (ConvHead, (2, 5, 5)),
}


class GraphCase:
    """A network, a batch, and its control.

    Args:
        name: of ``NETWORKS``.
        batch: B.
        **arguments: of :class:`ControlledNetwork`.
    """

    def __init__(self, name: str, batch: int = 4, seed: int = 0, **arguments: object) -> None:
        make, shape = NETWORKS[name]
        torch.manual_seed(seed)
        self.module = make().double()
        for parameter in self.module.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        self.x = torch.randn(batch, *shape, dtype=torch.float64)
        self.y = torch.randint(3, (batch,))
        self.network = ControlledNetwork(self.module, **{"seed": seed, **arguments})  # type: ignore[arg-type]
        self.forward = self.network.observe(self.x)
        held = copy.deepcopy(self.module)
        for m, norm in zip(self.module.modules(), list(held.modules())):
            if isinstance(m, nn.BatchNorm2d):  # the batch's statistics, held
                self._hold(m, norm)
        self.held = held.eval()

    def _hold(self, of: nn.Module, norm: nn.Module) -> None:
        seen: list[Tensor] = []
        hook = of.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
        with torch.no_grad():
            copy.deepcopy(self.module)(self.x)  # a twin, hooks and all, so that nothing moves
        hook.remove()
        axes = [0, *range(2, seen[-1].dim())]
        norm.running_var, norm.running_mean = torch.var_mean(seen[-1], axes, correction=0)

    def run(self, pushes: Sequence[Tensor | None], x: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """The output, before any log-softmax, with ``pushes`` added at the points, and the voltages there."""
        voltages: list[Tensor] = []
        handles = []
        for point, push in zip(self.network.points, pushes):
            at = self.held.get_submodule(point.name)
            if point.norm is not None:
                names = {id(m): n for n, m in self.module.named_modules()}
                at = self.held.get_submodule(names[id(point.norm)])

            def drive(m: nn.Module, args: object, out: Tensor, push: Tensor | None = push) -> Tensor:
                voltages.append(out if push is None else out + push)
                return voltages[-1].clone()  # what follows may work in place

            handles.append(at.register_forward_hook(drive))
        output = self._before_softmax(self.x if x is None else x)
        for handle in handles:
            handle.remove()
        return output, voltages

    def settled_voltages(self, pushes: Sequence[Tensor]) -> list[Tensor]:
        """The voltages with ``pushes`` added, without their history."""
        return [v.detach() for v in self.run(pushes)[1]]

    def _before_softmax(self, x: Tensor) -> Tensor:
        if not isinstance(self.held, ConvHead):
            return self.held(x)
        held = self.held
        return held.c2(F.leaky_relu(held.c1(x), 0.2)).mean((2, 3))

    def jacobians(self) -> list[Tensor]:
        """J_i of each sample by torch.func, (B, n_L, n_i)."""
        shapes = [v.shape[1:] for v in self.forward.v]
        found = []
        for b in range(len(self.x)):

            def output(*pushes: Tensor, b: int = b) -> Tensor:
                return self.run(pushes, self.x[b : b + 1])[0][0]

            still = tuple(torch.zeros(1, *s, dtype=torch.float64) for s in shapes)
            found.append([j.flatten(1) for j in jacrev(output, tuple(range(len(still))))(*still)])
        return [torch.stack(each) for each in zip(*found)]

    @property
    def loss_grad(self) -> Tensor:
        """∂ℓ_b/∂r_L of cross-entropy."""
        output = self.forward.output.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(output, self.y, reduction="sum"), output)[0]
