"""Every layer's gradient is bounded by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases.fits import Innocent, clusters, loader, quiet, strategy
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from dfc_lightning import DFA
from dfc_lightning.callbacks import LayerClipping


class Noted(Callback):
    """The norms of weight and bias together, one a layer, before each optimizer step."""

    def __init__(self) -> None:
        self.norms: list[list[float]] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        layers = [m for m in module.modules() if list(m.parameters(recurse=False))]
        self.norms.append([float(torch.cat([p.grad.flatten() for p in m.parameters()]).norm()) for m in layers])


@pytest.mark.parametrize("rule", ["backprop", "dfa"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_each_layer_keeps_its_direction_and_is_no_longer_than_the_bound(rule: str, accumulated: int) -> None:
    found: list[Tensor] = []
    for callbacks in ([], [LayerClipping(0.2)]):
        noted, s = Noted(), strategy(rule=DFA()) if rule == "dfa" else "auto"
        settings: dict[str, Any] = {"max_steps": 1, "accumulate_grad_batches": accumulated}
        quiet(s, callbacks=[*callbacks, noted], **settings).fit(Innocent(), loader(clusters()))
        found.append(torch.tensor(noted.norms[0]))
    free, bound = found
    assert (free > 0.2).any()
    assert torch.allclose(bound, free.clamp_max(0.2), rtol=1e-4)


@pytest.mark.parametrize("norm", [0.0, -1.0, float("inf"), float("nan")])
def test_bounds_without_sense_are_refused(norm: float) -> None:
    with pytest.raises(ValueError, match=r"max_norm=.*finite norm above zero"):
        LayerClipping(norm)
