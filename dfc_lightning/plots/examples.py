"""The small networks that Figures 1D and 2 are drawn of, with the authors' published settings."""

from __future__ import annotations

import torch
from torch import Tensor

from dfc_lightning.data.student_teacher import StudentTeacher
from dfc_lightning.network.initial_feedback import pseudoinverse_mean
from dfc_lightning.operations.nonlinearity import Identity, Nonlinearity, Tanh
from dfc_lightning.passes.dense import DensePass, Layers
from dfc_lightning.plots.figure_1d import Recording, record
from dfc_lightning.settling.controller import PIController
from dfc_lightning.settling.time_step import TimeStep


def controlled_student(seed: int = 0, batch_size: int = 128) -> Recording:
    """A fresh student of the student-teacher task with one output, 15-10-10-1, under control on one sample.

    The feedback weights are the batch's mean Jᵀ(JJᵀ + γI)⁻¹, what feedback learning tends to (Theorem 6).

    Args:
        seed: seed of the student, the teacher and the inputs.
        batch_size: how many inputs to average the feedback weights over; the first of them is the sample.
    """
    data = StudentTeacher(output_size=1, train_size=batch_size, validation_size=0, test_size=0, seed=seed)
    data.setup()
    assert data.train_set is not None
    inputs, targets = data.train_set.inputs, data.train_set.targets
    layers = _layers([15, 10, 10, 1], torch.Generator().manual_seed(seed))
    feedback = pseudoinverse_mean(DensePass.run(inputs, layers).jacobians())
    forward = DensePass.run(inputs[:1], layers, feedback)
    offset = 0.1 * (targets[:1] - forward.output)  # −λ ∂ℓ/∂r_L with λ = 0.05 and the squared error of the sample
    controller = PIController(alpha=0.0015, k_p=1.0, leak="control")
    return record(forward, offset, controller, TimeStep(dt=0.005, tau_ratio=0.2), steps=1999)


def small_jacobian(seed: int = 2) -> Tensor:
    """J of a fresh tanh network 5-2-2 for one normally distributed input, (2, 4).

    Args:
        seed: seed of the network and the input; by default one whose Jᵀ and J† are well apart.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = _layers([5, 2, 2], generator)
    forward = DensePass.run(torch.randn(1, 5, generator=generator), layers)
    return torch.cat(forward.jacobians(), dim=2)[0]


def _layers(sizes: list[int], generator: torch.Generator) -> Layers:
    """Those of a tanh network with linear output and Xavier weights."""
    weights = [torch.empty(after, before) for before, after in zip(sizes, sizes[1:])]
    for weight in weights:
        torch.nn.init.xavier_normal_(weight, generator=generator)
    nonlinearities: list[Nonlinearity] = [*(Tanh() for _ in weights[1:]), Identity()]
    return Layers(weights, [None] * len(weights), nonlinearities)
