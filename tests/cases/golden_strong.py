"""The golden case of strong feedback: what the authors' code of Strong-DFC computes, in float64.

Their gradients of forward weights are twice ours. What they keep as the control of a noisy run is its last value.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cases.golden import FOLDER
from dfc_lightning.operations.nonlinearity import Identity, Tanh
from dfc_lightning.passes import DensePass, Layers
from dfc_lightning.passes.chance import Chance, Drawing
from dfc_lightning.settling import PIController, StrongSimulation

DEPTH = 3


class Strong:
    """The file, and for each mode the settings that it stands for."""

    def __init__(self) -> None:
        with np.load(FOLDER / "strong_tanh_6543.npz") as file:
            self.arrays = {key: file[key] for key in file.files}
        self.modes: dict[str, dict[str, Any]] = json.loads(str(self.arrays["meta_json"]))["modes"]
        self.forward = DensePass.run(
            self["x"], Layers(self.layers("W"), self.layers("b"), [Tanh(), Tanh(), Identity()]), self.layers("Q")
        )

    def __getitem__(self, key: str) -> Tensor:
        return torch.as_tensor(self.arrays[key])

    def layers(self, name: str, mode: str = "") -> list[Tensor]:
        prefix = f"{mode}__" if mode else ""
        return [self[f"{prefix}{name}{i + 1}"] for i in range(DEPTH)]

    def of(self, mode: str, name: str) -> Any:
        """A setting, that of the feedback phase if the mode is one."""
        settings = self.modes[mode]
        return settings[f"{name}_fb"] if settings["phase"] == "fb" else settings[name]

    def single(self, mode: str) -> bool:
        return self.modes[mode]["cls"] == "DFCNetworkSinglePhase"

    def noisy(self, mode: str) -> bool:
        return f"{mode}__noise1" in self.arrays

    def link(self, mode: str) -> Any:
        return "softmax" if self.modes[mode]["loss_function_name"] == "cross_entropy" else "identity"

    def loss_grad(self, mode: str) -> Tensor:
        """∂ℓ_b/∂r_L of each sample's own loss, by autograd."""
        output = self.forward.output.clone().requires_grad_()
        if mode.endswith("nocontrol") or mode == "weak_fb":  # driven to where it is
            return torch.zeros_like(output)
        if self.link(mode) == "softmax":
            loss = torch.nn.functional.cross_entropy(output, self["y"], reduction="sum")
        else:
            loss = 0.5 * (output - self["y"]).square().sum()
        return torch.autograd.grad(loss, output)[0]

    def controller(self, mode: str) -> PIController:
        return PIController(self.of(mode, "alpha_di"), self.of(mode, "k_p"), leak="control")

    def simulation(self, mode: str) -> StrongSimulation:
        settings, noisy = self.modes[mode], self.noisy(mode)
        apical = -1 if self.single(mode) else self.of(mode, "apical_time_constant")
        return StrongSimulation(
            steps=self.of(mode, "tmax_di") - 1,
            dt=self.of(mode, "dt_di"),
            tau_ratio=self.of(mode, "time_constant_ratio"),
            apical_tau=None if apical == -1 else apical,
            proactive=settings["proactive_controller"],
            sigma=self.of(mode, "sigma") if noisy else 0.0,
            sigma_output=self.of(mode, "sigma_output") if noisy else None,
            tau_noise=settings["tau_noise"] if self.single(mode) else None,
        )

    def tau_f(self, mode: str) -> float | None:
        """Theirs filters by the share of a step of the forward phase, also before training."""
        settings = self.modes[mode]
        return settings["tau_f"] * self.of(mode, "dt_di") / settings["dt_di"] if self.single(mode) else None

    def layer_gain(self, mode: str) -> float:
        """Theirs has the somatic time constant of the forward phase, also before training."""
        settings = self.modes[mode]
        return 1 + settings["time_constant_ratio"] / settings["tau_noise"] if settings["scaling_fb_updates"] else 1.0

    def draws(self, mode: str) -> Callable[..., Tensor]:
        """The noise of the mode, step by step."""
        steps = itertools.count()

        def draw(*_: Any) -> Tensor:
            step = next(steps)
            return torch.cat([noise[step] for noise in self.layers("noise", mode)], dim=1)

        return draw

    def chance(self, mode: str) -> Chance:
        """The same as what a rule draws."""
        case = self

        class Recorded(Drawing):
            def __init__(self, chance: Chance) -> None:
                self.draw = case.draws(mode)

            def of_samples(self, shape: Sequence[int]) -> Tensor:
                return self.draw()

        class Given(Chance):
            def drawing(self) -> Drawing:
                return Recorded(self)

        return Given(0, 0)


@cache
def strong() -> Strong:
    return Strong()
