"""The golden cases: inputs and outputs of the reference implementation, in float64.

``golden_arrays/*.npz`` were computed by the authors' published code. Their gradients are twice ours, taken with the
mean-reduced loss inside the target, and not divided by the target stepsize: ours = theirs · B / (2 λ_reference).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfc_lightning.operations.nonlinearity import Identity, Tanh
from dfc_lightning.passes import DensePass, Layers
from dfc_lightning.rules import DFC
from dfc_lightning.settling import Euler, Linearized, PIController

FOLDER = Path(__file__).parent / "golden_arrays"
CASES = {"a": "a_linear_6543_mse", "b": "b_tanh_6543_mse", "c": "c_tanh_20x16x16x16x10_ce"}
DFA_CASES = ("e_dfa_tanh_6543_mse", "e_dfa_tanh_20x16x16x16x10_ce")
PLASTICITIES = {
    "nonlinear_difference": "rate_difference",
    "voltage_difference": "voltage_difference",
    "derivative_matrix": "derivative",
}


class Golden:
    """One file of golden arrays."""

    def __init__(self, name: str) -> None:
        with np.load(FOLDER / f"{name}.npz") as file:
            self.arrays = {key: file[key] for key in file.files}
        self.meta = json.loads(str(self.arrays["meta_json"]))
        self.modes: dict[str, dict[str, Any]] = self.meta.get("modes", {})
        self.sizes: list[int] = self.meta["spec"]["sizes"]
        self.depth = len(self.sizes) - 1
        self.stepsize: float = self.meta["target_stepsize"]
        hidden = Identity() if self.meta["spec"]["act"] == "linear" else Tanh()
        last = torch.eye(self.sizes[-1], dtype=torch.float64)  # where the reference has no Q_L (its DFA)
        self.feedback = [self[f"Q{i}"] if f"Q{i}" in self.arrays else last for i in range(1, self.depth + 1)]
        phi = [hidden] * (self.depth - 1) + [Identity()]
        self.forward = DensePass.run(self["x"], Layers(self.layers("W"), self.layers("b"), phi), self.feedback)

    def __getitem__(self, key: str) -> Tensor:
        return torch.as_tensor(self.arrays[key])

    def layers(self, name: str, mode: str = "") -> list[Tensor]:
        prefix = f"{mode}__" if mode else ""
        return [self[f"{prefix}{name}{i + 1}"] for i in range(self.depth)]

    @property
    def loss_grad(self) -> Tensor:
        """∂ℓ_b/∂r_L of the per-sample loss, by autograd."""
        output = self.forward.output.clone().requires_grad_()
        if self.meta["spec"]["loss"] == "ce":
            loss = torch.nn.functional.cross_entropy(output, self["y"], reduction="sum")
        else:
            loss = torch.nn.functional.mse_loss(output, self["y"]) * len(output)
        return torch.autograd.grad(loss, output)[0]

    @property
    def batch_size(self) -> int:
        return len(self["x"])

    def to_ours(self, gradient: Tensor) -> Tensor:
        """A gradient of the reference in our units."""
        return gradient * self.batch_size / (2 * self.stepsize)

    def rule(self, mode: str) -> DFC:
        """The rule that a mode of the reference stands for."""
        settings = self.modes[mode]
        apical = settings["apical_time_constant"]
        euler = Euler(
            steps=int(settings["tmax_di"]) - 1,
            dt=settings["dt_di"],
            tau_ratio=settings["time_constant_ratio"],
            apical_tau=None if apical in (-1, settings["dt_di"]) else apical,
            instant_transmission=settings["inst_transmission"],
            instant_system=settings["inst_system_dynamics"],
            proactive=settings["proactive_controller"],
            error_reduction=settings["epsilon_di"] ** 2,
        )
        linear = settings["ndi"]
        return DFC(
            settling=Linearized() if linear else euler,
            controller=PIController(settings["alpha_di"], settings["k_p"], leak="control"),
            target_stepsize=self.stepsize / self.batch_size,
            integrate=settings["grad_deltav_cont"] and not linear,
            plasticity=PLASTICITIES[settings["learning_rule"]],
            unconverged="keep" if linear or settings["include_non_converged_samples"] else "drop",
        )


@cache
def golden(name: str) -> Golden:
    return Golden(name)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-300))
