"""Euler steps of a dense chain as one CUDA graph, replayed: what launches cost of a simulation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dfc_lightning import ControlledNetwork, PIController
from dfc_lightning.settling.dynamics import ControlledDynamics, dynamics_of
from dfc_lightning.settling.time_step import TimeStep


class Captured:
    """A block of steps, recorded once.

    Args:
        dynamics: of a chain, whose steps work in place; at its beginning, where it is again afterwards.
        steps: in a block.
    """

    def __init__(self, dynamics: ControlledDynamics, steps: int) -> None:
        self.dynamics, self.steps = dynamics, steps
        self._rates = list(dynamics.rates)  # read at the beginning of a block, and so written at its end
        moving = [dynamics.u, dynamics.u_int, dynamics.stacked_apical, dynamics._u_before]
        moving += [*dynamics.basal, *dynamics.somatic, *self._rates]
        before = [t.clone() for t in moving]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._block(1)  # libraries make their workspaces
            self.graph = torch.cuda.CUDAGraph()
            self.graph.capture_begin(capture_error_mode="thread_local")
            self._block(steps)
            self.graph.capture_end()
            for state, was in zip(moving, before):
                state.copy_(was)
        torch.cuda.current_stream().wait_stream(stream)

    def _block(self, steps: int) -> None:
        for _ in range(steps):
            self.dynamics.advance_control()
            self.dynamics.advance_compartments()
        for held, now in zip(self._rates, self.dynamics.rates):
            held.copy_(now)
        self.dynamics.rates = list(self._rates)

    def advance(self, blocks: int) -> None:
        """So many blocks."""
        for _ in range(blocks):
            self.graph.replay()


def ways(module: nn.Module, x: Tensor, steps: int, block: int) -> tuple[dict[str, Callable[[], Any]], float]:
    """Simulations of a chain, by steps, by a graph made anew, and by one that is there; and how far these are apart."""
    network = ControlledNetwork(module, seed=0)
    forward = network.bound(network.observe(x))
    offset = 0.1 * torch.randn_like(forward.output)

    def fresh() -> ControlledDynamics:
        return dynamics_of(forward, offset, PIController(0.1, 1.0), TimeStep())

    def eager() -> Sequence[Tensor]:
        dynamics = fresh()
        for _ in range(steps):
            dynamics.advance_control()
            dynamics.advance_compartments()
        return dynamics.snapshot()

    def anew() -> Sequence[Tensor]:
        captured = Captured(fresh(), block)
        captured.advance(steps // block)
        return captured.dynamics.snapshot()

    with torch.no_grad():
        there = Captured(fresh(), block)
        apart = max(float((a - b).norm() / b.norm()) for a, b in zip(anew(), eager()))
    return {
        f"{steps} Euler steps alone": torch.no_grad()(eager),
        "the same, a graph made anew": torch.no_grad()(anew),
        "the same, a graph that is there": lambda: there.advance(steps // block),
    }, apart
