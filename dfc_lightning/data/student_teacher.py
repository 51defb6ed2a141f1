from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from dfc_lightning.data.tensors import TensorDataModule, TensorPairs


class StudentTeacher(TensorDataModule):
    """Regression on the outputs of a random ReLU network, the task of Figure 3 of Meulemans et al. (2021).

    Inputs are uniform in [-1, 1]. The teacher has no biases and weights from a normal distribution with
    standard deviation gain * sqrt(2 / (fan_in + fan_out)); its last layer is linear. The student of Figure 3
    has two hidden layers of 10 tanh units: ``MLP([15, 10, 10, 5])``.

    A batch is an input of shape (B, input_size) and a target of shape (B, output_size), both float32.

    Args:
        input_size: Number of inputs.
        output_size: Number of outputs.
        teacher_hidden_sizes: Width of each hidden layer of the teacher.
        teacher_gain: Gain of the teacher's weights.
        train_size: Training samples.
        validation_size: Validation samples; 0 leaves no validation set.
        test_size: Test samples.
        batch_size: Samples in a training batch.
        seed: Seed of teacher and inputs, which are independent of PyTorch's global generator.
        eval_batch_size: Samples in a validation or test batch.
        num_workers: Processes that load batches; 0 loads in the main process.
        shuffle: Whether each training epoch visits the samples in a new order.
    """

    def __init__(
        self,
        input_size: int = 15,
        output_size: int = 5,
        teacher_hidden_sizes: tuple[int, ...] = (1000, 1000, 1000, 1000),
        teacher_gain: float = 3.0,
        train_size: int = 5000,
        validation_size: int = 1000,
        test_size: int = 1000,
        batch_size: int = 128,
        seed: int = 0,
        eval_batch_size: int = 1000,
        num_workers: int = 0,
        shuffle: bool = True,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, shuffle)
        self.teacher_sizes = [input_size, *teacher_hidden_sizes, output_size]
        self.teacher_gain = teacher_gain
        self.set_sizes = (train_size, validation_size, test_size)
        self.seed = seed

    def setup(self, stage: str | None = None) -> None:
        """Draw the teacher, then the inputs of the three sets, once."""
        if self.train_set is not None:
            return
        generator = torch.Generator().manual_seed(self.seed)
        weights = [
            self.teacher_gain
            * math.sqrt(2 / (fan_in + fan_out))
            * torch.randn(fan_out, fan_in, generator=generator, dtype=torch.float32)
            for fan_in, fan_out in pairwise(self.teacher_sizes)
        ]
        self.train_set, self.val_set, self.test_set = (self._draw(size, weights, generator) for size in self.set_sizes)

    def _draw(self, size: int, weights: list[Tensor], generator: torch.Generator) -> TensorPairs:
        inputs = 2 * torch.rand(size, self.teacher_sizes[0], generator=generator, dtype=torch.float32) - 1
        hidden = inputs
        for weight in weights[:-1]:
            hidden = torch.relu(hidden @ weight.T)
        return TensorPairs(inputs, hidden @ weights[-1].T)
