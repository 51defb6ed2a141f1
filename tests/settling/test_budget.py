"""What a steady state may cost: never more than its budget in forward passes, and what is left unsettled is said."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfc_lightning import DFC, ControlledNetwork, ForwardPass, PIController
from dfc_lightning.settling import SteadyState

BATCH = 24


def bounded(outputs: int, general: bool) -> tuple[ControlledNetwork, Tensor, Tensor]:
    """A network whose hidden rates end at ±1, and labels."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, outputs))
    net = ControlledNetwork(module, feedback_init="normal", general=general, seed=0)
    return net, torch.randn(BATCH, 6), torch.randint(outputs, (BATCH,))


@pytest.fixture
def spent(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every forward pass under control, and every row of a gain, in passes of the whole batch."""
    found: list[float] = []

    def counting(kind: type[ForwardPass]) -> None:
        respond, gain = kind.respond, kind.gain

        def counted_respond(self: ForwardPass, driven: list[Tensor]) -> object:
            found.append(len(driven[0]) / BATCH)
            return respond(self, driven)

        def counted_gain(self: ForwardPass, at: object = None) -> Tensor:
            found.append(self.batch_size * self.outputs / BATCH)
            return gain(self, at)

        monkeypatch.setattr(kind, "respond", counted_respond)
        monkeypatch.setattr(kind, "gain", counted_gain)

    for general in (False, True):
        net, x, _ = bounded(3, general)
        counting(type(net.observe(x)))
    return found


@pytest.mark.parametrize("general", [False, True], ids=["chain", "recorded"])
@pytest.mark.parametrize("outputs", [3, 10, 20])
@pytest.mark.parametrize("max_passes", [1, 12, 30, 60, 200])
def test_a_target_beyond_reach_costs_no_more_than_the_budget(outputs, max_passes, general, spent):
    net, x, _ = bounded(outputs, general)
    forward = net.observe(x)
    forward = forward.with_feedback([*forward.feedback[:-1], torch.zeros(outputs, outputs)])  # by hidden layers alone
    spent.clear()
    offset = torch.full((BATCH, outputs), 30.0)
    offset[::2] = 1e-3  # these can be met
    settled = SteadyState(max_passes=max_passes).settle(forward, offset, PIController(alpha=0.0))
    start = 2 + outputs  # the linearised solution, and the controlled network at the end, are had at any price
    assert sum(spent) <= max_passes + start
    assert not settled.converged[1::2].any()
    assert torch.isfinite(settled.control).all() and torch.isfinite(settled.residual).all()
    assert (settled.residual <= 1 + 1e-6).all()  # no worse than no control


def test_no_more_is_spent_on_what_settles_early(spent):
    net, x, _ = bounded(10, True)
    forward = net.observe(x)
    offset = torch.full((BATCH, 10), 1e-3)
    found = []
    for max_passes in (60, 1e9):
        spent.clear()
        settled = SteadyState(max_passes=max_passes).settle(forward, offset, PIController())
        assert settled.converged.all()
        found.append((sum(spent), settled.iterations, settled.control))
    assert found[0][:2] == found[1][:2] and torch.equal(found[0][2], found[1][2])


@pytest.mark.parametrize("unconverged", ["keep", "drop"])
def test_samples_that_the_budget_does_not_do_for_are_handled_as_unconverged(unconverged):
    net, x, y = bounded(10, True)
    rule = DFC(SteadyState(max_passes=1, rtol=1e-7), PIController(alpha=1e-3), 3.0, unconverged=unconverged)
    with net.taught_by(rule) as lesson:
        loss = F.cross_entropy(net(x), y)
    loss.backward()
    assert not lesson.settled.converged.any()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in net.module.parameters()))
    assert (norm == 0) == (unconverged == "drop") and math.isfinite(norm)


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(ValueError, match="max_passes=0.*100"):
        SteadyState(max_passes=0)
