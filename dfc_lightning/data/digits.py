from __future__ import annotations

import torch

from dfc_lightning.data.tensors import TensorDataModule, TensorPairs, random_split_indices

# Mean and standard deviation over all pixels of the 1,797 images, scaled to [0, 1].
_MEAN, _STD = 0.3053, 0.3761


class Digits(TensorDataModule):
    """Scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels in ten classes; nothing to download.

    A batch is an input of shape (B, 1, 8, 8), float32, and labels of shape (B,), int64.

    Args:
        batch_size: Samples in a training batch.
        validation_size: Samples held out for validation.
        test_size: Samples held out for the test.
        standardize: Whether to centre and scale pixels to zero mean and unit variance. Otherwise they lie
            in [0, 1].
        seed: Seed of the split, which is independent of PyTorch's global generator.
        eval_batch_size: Samples in a validation or test batch.
        num_workers: Processes that load batches; 0 loads in the main process.
        shuffle: Whether each training epoch visits the samples in a new order.
    """

    def __init__(
        self,
        batch_size: int = 32,
        validation_size: int = 270,
        test_size: int = 270,
        standardize: bool = True,
        seed: int = 0,
        eval_batch_size: int = 1000,
        num_workers: int = 0,
        shuffle: bool = True,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, shuffle)
        if validation_size < 0 or test_size < 0 or validation_size + test_size >= 1797:
            raise ValueError(
                f"validation_size={validation_size} and test_size={test_size} must not be negative "
                "and must leave some of the 1797 samples for training."
            )
        self.validation_size = validation_size
        self.test_size = test_size
        self.standardize = standardize
        self.seed = seed

    def setup(self, stage: str | None = None) -> None:
        """Load and split the images, once."""
        if self.train_set is not None:
            return
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError(
                'Digits needs scikit-learn. Install it with: pip install "dfc_lightning[recipes]"'
            ) from error
        images, labels = load_digits(return_X_y=True)
        inputs = torch.as_tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        if self.standardize:
            inputs = (inputs - _MEAN) / _STD
        targets = torch.as_tensor(labels, dtype=torch.int64)
        self.train_set, self.val_set, self.test_set = (
            TensorPairs(inputs[part], targets[part])
            for part in random_split_indices(len(inputs), [self.validation_size, self.test_size], self.seed)
        )
