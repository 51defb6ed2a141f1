"""Remedies that the errors of the training layer name are followed: what is trained then learns as by backprop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from cases.fits import NO_FEEDBACK, Innocent, Plain, loader, quiet, strategy, weights
from torch import Tensor, nn

from dfc_lightning import DFC, Backprop, ControlError, ControlledNetwork, DFCStrategy
from dfc_lightning.settling import Euler, SteadyState, Trajectory


class OneOptimizerInGroups(Plain):
    """For several optimizers."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(
            [{"params": self.net[0].parameters(), "lr": 0.01}, {"params": self.net[2:].parameters(), "lr": 0.1}]
        )


class TakesBatches(Innocent):
    """For a step that draws its batches itself."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])


def frozen_slope() -> L.LightningModule:
    module = Plain()
    module.net = nn.Sequential(nn.Linear(6, 12), nn.PReLU(), nn.Linear(12, 3))
    module.net[1].weight.requires_grad_(False)
    module.configure_optimizers = lambda: torch.optim.SGD(module.net[::2].parameters(), 0.1)
    return module


def called_once(module: Innocent, batch: Any) -> Tensor:
    logits = module(batch[0])
    return F.cross_entropy(logits, batch[1]) + F.cross_entropy(2 * logits, batch[1])


def layer_left_out(module: Innocent, batch: Any) -> Tensor:
    return F.cross_entropy(module.net[2](torch.relu(module.net[0](batch[0]))), batch[1] % 8)


def layer_frozen() -> L.LightningModule:
    module = Plain(layer_left_out)
    module.net[4].requires_grad_(False)
    return module


def flattened(module: Innocent, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0].unsqueeze(1).flatten(1)), batch[1])


def uncut(module: Innocent, batch: Any) -> Any:
    logits = module(batch[0])
    return {"loss": F.cross_entropy(logits, batch[1]), "logits": logits.detach()}


FOLLOWED: dict[str, Callable[[], L.LightningModule]] = {
    "one optimizer, in groups": OneOptimizerInGroups,
    "batches as arguments": TakesBatches,
    "the slope frozen": frozen_slope,
    "called once": lambda: Plain(called_once),
    "the unused layer frozen": layer_frozen,
    "flattened": lambda: Plain(flattened),
    "a loss of the output, without detach": lambda: Plain(uncut),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_follows_the_remedy_learns(name):
    torch.manual_seed(0)
    plain = FOLLOWED[name]()
    torch.manual_seed(0)
    taught = FOLLOWED[name]()
    torch.manual_seed(0)
    by_dfc = FOLLOWED[name]()
    before = weights(plain)
    quiet().fit(plain, loader())
    quiet(strategy(rule=Backprop())).fit(taught, loader())
    assert torch.allclose(weights(plain), weights(taught), 1e-4, 1e-5)
    quiet(strategy()).fit(by_dfc, loader())
    assert weights(by_dfc).isfinite().all() and not torch.allclose(weights(by_dfc), before)


class Convolution(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))


@pytest.mark.parametrize("instead", [Euler(steps=40), SteadyState()], ids=lambda s: type(s).__name__)
def test_the_settling_that_is_advised_for_other_layers(instead):
    module = Convolution()
    wrong = DFCStrategy(rule=DFC(settling=Trajectory(), integrate=True), feedback=NO_FEEDBACK)
    with pytest.raises(ControlError, match=r"Euler\(\.\.\.\).*SteadyState\(\) and integrate=False"):
        quiet(wrong).fit(module, loader())
    before = weights(module)
    right = DFC(settling=instead, integrate=isinstance(instead, Euler))
    quiet(DFCStrategy(rule=right, feedback=NO_FEEDBACK)).fit(module, loader())
    assert weights(module).isfinite().all() and not torch.allclose(weights(module), before)


def test_a_change_in_place_is_refused_and_clone_or_a_later_step_is_not():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    net, x, y = ControlledNetwork(module), torch.randn(4, 6), torch.tensor([0, 1, 2, 0])

    def loss() -> Tensor:
        with net.taught_by(Backprop()):
            return F.cross_entropy(net(x), y)

    taught = loss()
    with torch.no_grad():
        module[2].weight.mul_(2)
    with pytest.raises(ControlError, match=r"after backward\(\), and clone\(\)"):
        taught.backward()
    module.zero_grad()
    taught = loss()
    changed = x.clone().mul_(2)
    taught.backward()
    found = [p.grad.clone() for p in module.parameters()]
    expected = torch.autograd.grad(F.cross_entropy(module(x), y), list(module.parameters()))
    assert all(torch.allclose(a, b, 1e-5, 1e-6) for a, b in zip(found, expected)) and not torch.equal(changed, x)


def test_feedback_of_its_own_scale_where_the_initial_one_overflows():
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    for layer in (module[2], module[4]):
        nn.init.constant_(layer.weight, 1e30)
    x = torch.ones(4, 6)
    with pytest.raises(ControlError, match="feedback_init='xavier_normal'"):
        ControlledNetwork(module).observe(x)
    net = ControlledNetwork(module, feedback_init="xavier_normal")
    net.observe(x)
    assert all(q.isfinite().all() for q in net.feedback)
