"""The authors' published implementation on the same work, from a checkout that the user names.

https://github.com/meulemansalex/deep_feedback_control, its ``DFCNetwork``; nothing of it is part of this repository.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from problems import Problem, Settings
from torch import Tensor

from dfc_lightning.passes.dense import as_dense

SIMULATED: dict[str, Any] = {
    "tmax_di": 1000,
    "dt_di": 0.02,
    "time_constant_ratio": 0.2,
    "apical_time_constant": 0.02,
    "epsilon_di": 0.5,
}
"""The published time of MNIST; they count states, one more than steps."""

UPDATES: dict[str, dict[str, Any]] = {
    "DFC-SSA": {"ndi": True},
    "DFC-SS": {"efficient_controller": True, **SIMULATED},
    "DFC, 999 steps": {"grad_deltav_cont": True, **SIMULATED},
}
"""Arguments of their network for each update, by the name of ours."""

LOGGING = ("tensorboardX", "pandas")
"""Libraries that they import for their logs only."""


def network_class(path: Path) -> Any:
    """Their ``DFCNetwork``; what it needs of libraries and is no longer there is replaced for it."""
    if not (path / "networks" / "tpdi_networks.py").exists():
        raise SystemExit(f"--reference {path}: no checkout of github.com/meulemansalex/deep_feedback_control there")
    for library in LOGGING:
        if library not in sys.modules and importlib.util.find_spec(library) is None:
            sys.modules[library] = MagicMock()
    torch.solve = lambda right, matrix: (torch.linalg.solve(matrix, right), None)  # removed from torch since
    sys.path.insert(0, str(path))
    return importlib.import_module("networks.tpdi_networks").DFCNetwork


class Reference:
    """Their network with the weights, feedback weights and settings of one of our problems.

    Args:
        path: the checkout.
        settings: those of the recipe.
        problem: what to copy.
    """

    def __init__(self, path: Path, settings: Settings, problem: Problem, **arguments: Any) -> None:
        self.problem, first, *hidden, last = problem, *settings.sizes
        self.stepsize = settings.target_stepsize * len(problem.x)  # theirs is for the mean loss
        pi, published = settings.controller, settings.sampled
        with self._quiet():
            self.network = network_class(path)(
                first,
                hidden,
                last,
                activation=settings.nonlinearity,
                alpha_di=pi.alpha,
                k_p=pi.k_p,
                learning_rule="nonlinear_difference",
                inst_transmission=True,
                inst_transmission_fb=True,
                proactive_controller=True,
                simulate_layerwise=True,
                include_non_converged_samples=True,
                fb_learning_rule="normal_controller",
                tmax_di_fb=published.steps + 1,
                dt_di_fb=published.dt,
                time_constant_ratio_fb=published.tau_ratio,
                apical_time_constant_fb=published.apical_tau,
                alpha_fb=published.alpha,
                k_p_fb=published.k_p,
                sigma_fb=published.sigma,
                sigma_output_fb=published.sigma,
                **arguments,
            )
        forward = as_dense(problem.network.observe(problem.x), "Their implementation", "Leave --reference out.")
        for layer, w, b, q in zip(self.network.layers, forward.weights, forward.biases, forward.feedback):
            layer.weights.data, layer.feedbackweights = w.clone(), q.clone()
            if b is not None:
                layer.bias.data = b.detach().clone()

    def update(self) -> None:
        """Forward pass, loss, and their backward with ``.grad`` written."""
        for parameter in (p for layer in self.network.layers for p in (layer.weights, layer.bias)):
            parameter.grad = torch.zeros_like(parameter)
        with self._quiet():
            loss = self.problem.loss(self.network.forward(self.problem.x), self.problem.y)
            self.network.backward(loss, self.stepsize)

    def feedback_update(self) -> None:
        """Forward pass and their gradients of the feedback weights, without an optimizer's step."""
        with self._quiet(), torch.no_grad():
            self.network.forward(self.problem.x)
            self.network.compute_feedback_gradients()

    def gradient(self) -> Tensor:
        """Their update in our units, in one vector."""
        self.update()
        scale = len(self.problem.x) / (2 * self.stepsize)
        return scale * torch.cat([g.flatten() for la in self.network.layers for g in (la.weights.grad, la.bias.grad)])

    @contextlib.contextmanager
    def _quiet(self) -> Any:
        """Without their messages, and with the problem's dtype for what they make without naming one."""
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.problem.x.dtype)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                yield
        finally:
            torch.set_default_dtype(default)


def updates(path: Path, settings: Settings, problem: Problem) -> dict[str, Reference]:
    """Theirs for each of ``UPDATES``."""
    return {name: Reference(path, settings, problem, **arguments) for name, arguments in UPDATES.items()}
