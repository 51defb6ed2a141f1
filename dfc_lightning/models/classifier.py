from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from dfc_lightning.errors import require
from dfc_lightning.models.supervised import Supervised

_STAGES = ("train", "val", "test")


class ErrorPercent(MulticlassAccuracy):
    """Misclassified samples in percent of all samples.

    Args:
        num_classes: Number of classes.

    Example:
        >>> error = ErrorPercent(num_classes=3)
        >>> error(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 2, 0]))
        tensor(25.)
    """

    higher_is_better = False

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, average="micro", validate_args=False)

    def compute(self) -> Tensor:
        """The error so far, a scalar between 0 and 100."""
        return 100 * (1 - super().compute())


class Classifier(Supervised):
    """Classification by cross-entropy.

    Takes batches of an input of shape (B, ...) and labels of shape (B,), int64; the network returns logits of
    shape (B, num_classes). Logs the loss in nats and the error in percent of an epoch: ``train/loss``,
    ``train/error``, ``val/loss``, ``val/error``, ``test/loss``, ``test/error``. The training error is that of
    the outputs made while training.

    Args:
        network: Maps an input of shape (B, ...) to logits of shape (B, num_classes).
        optimizer: Makes the optimizer from the parameters.
        scheduler: Makes a learning-rate scheduler from the optimizer, stepped once an epoch; one that waits
            for a plateau watches ``val/loss``, unless it names its own ``monitor``.
        num_classes: Number of classes. By default the number of outputs of the network's last ``nn.Linear``.
        label_smoothing: Share s of a label that is spread over all K classes: s/K each, and 1 − s more for its own.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        scheduler: LRSchedulerCallable | None = None,
        num_classes: int | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(network, optimizer, scheduler)
        remedy = "give a share of at least 0 and below 1"
        require(0 <= label_smoothing < 1, "label_smoothing", label_smoothing, remedy)
        self.label_smoothing = label_smoothing
        classes = num_classes or _outputs(network)
        # "train" alone would collide with a method of ModuleDict.
        self.errors = nn.ModuleDict({f"{stage}_error": ErrorPercent(classes) for stage in _STAGES})

    def loss(self, output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy of the logits, shape (B, num_classes), in nats, averaged over the batch."""
        return F.cross_entropy(output, batch[1], label_smoothing=self.label_smoothing)

    def _log_metrics(self, stage: str, output: Tensor, batch: tuple[Tensor, Tensor]) -> None:
        error = cast(ErrorPercent, self.errors[f"{stage}_error"])
        error.update(output.detach(), batch[1])
        self.log(f"{stage}/error", error, on_step=False, on_epoch=True, prog_bar=stage == "val")


def _outputs(network: nn.Module) -> int:
    sizes = [module.out_features for module in network.modules() if isinstance(module, nn.Linear)]
    if not sizes:
        raise ValueError(
            f"num_classes=None cannot be inferred: {type(network).__name__} has no nn.Linear. Give num_classes."
        )
    return sizes[-1]
