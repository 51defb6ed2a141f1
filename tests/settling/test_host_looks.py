"""On a GPU the host looks at data no more often than stated: counted on tensors that have a device but no data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases.chains import make
from cases.looks import Looks
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dfc_lightning.passes import DensePass, Layers
from dfc_lightning.settling import Dynamics, Euler, Linearized, PIController, SteadyState
from dfc_lightning.settling.time_step import TimeStep
from dfc_lightning.settling.time_sum import BLOCK

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and torch.__version__ < (2, 10), reason="torch asks for a driver even of fake tensors"
)


def looks(net: tuple, work: Callable[[DensePass, Tensor], Any]) -> int:
    """How often ``work`` looks when it runs on a GPU."""
    case = make((net, "tanh", "squared"))
    with FakeTensorMode():

        def on_gpu(t: Tensor) -> Tensor:
            return torch.empty(t.shape, dtype=t.dtype, device="cuda")

        weights, biases, phi = case.layers
        weights, biases, feedback = ([on_gpu(t) for t in each] for each in (weights, biases, case.feedback))
        forward = DensePass.run(on_gpu(case.x), Layers(weights, biases, phi), feedback)
        offset = torch.empty_like(forward.output)
        with Looks() as counter:
            work(forward, offset)
    return counter.count


CONTROLLER = PIController(0.1, 1.0)
SMALL, LARGE, OUTPUTS = (6, 5, 4, 3), (6, 90, 80, 70, 3), (6, 90, 70, 20)


def test_a_look_is_counted() -> None:
    assert looks(SMALL, lambda forward, offset: bool((offset > 0).all())) == 1
    assert looks(SMALL, lambda forward, offset: float(offset.sum())) == 1


@pytest.mark.parametrize("apical_tau", [None, 0.3])
@pytest.mark.parametrize("instant", [True, False])
def test_no_step_of_the_dynamics_looks(instant: bool, apical_tau: float | None) -> None:
    def steps(forward: DensePass, offset: Tensor) -> None:
        step = TimeStep(0.02, 0.2, apical_tau, instant_transmission=instant)
        dynamics = Dynamics(forward, offset, CONTROLLER, step)
        for _ in range(3):
            dynamics.advance_control()
            dynamics.advance_compartments()

    assert looks(LARGE, steps) == 0


@pytest.mark.slow
@pytest.mark.parametrize("net", [SMALL, LARGE], ids=["small", "large"])
def test_a_simulation_looks_once_a_block_of_steps(net: tuple) -> None:
    def settle(forward: DensePass, offset: Tensor) -> None:
        Euler(steps=5 * BLOCK + 1).settle(forward, offset, CONTROLLER)

    def integrate(forward: DensePass, offset: Tensor) -> None:
        Euler(steps=5 * BLOCK + 1).settle_and_integrate(forward, offset, CONTROLLER, "rate_difference", False)

    assert looks(net, settle) == 0
    # For each of the two wide products in one transfer, but counted one by one; and whether any sample has diverged.
    assert looks(net, integrate) == 1 + (10 if net == LARGE else 0)


def test_an_early_stop_looks_at_every_eighth_step() -> None:
    def settle(forward: DensePass, offset: Tensor) -> None:
        settled = Euler(steps=40, stop_below=1e-3).settle(forward, offset, CONTROLLER)
        assert settled.iterations == 8

    assert looks(SMALL, settle) == 1


@pytest.mark.parametrize("net", [SMALL, OUTPUTS], ids=["own inverse", "mean-field inverse"])
def test_a_steady_state_looks_at_every_fourth_iteration(net: tuple) -> None:
    def settle(forward: DensePass, offset: Tensor) -> None:
        settled = SteadyState(max_iterations=24).settle(forward, offset, CONTROLLER)
        assert settled.iterations == 24

    assert looks(net, settle) <= 2 + 24 // 4


@pytest.mark.parametrize("net", [SMALL, OUTPUTS], ids=["own inverse", "mean-field inverse"])
def test_a_linearized_state_looks_at_every_fourth_iteration(net: tuple) -> None:
    def settle(forward: DensePass, offset: Tensor) -> None:
        Linearized(max_iterations=24).settle(forward, offset, CONTROLLER)

    assert looks(net, settle) <= (1 + 24 // 4 if net == OUTPUTS else 0)
