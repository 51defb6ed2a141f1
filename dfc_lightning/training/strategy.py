"""``Trainer(strategy=DFCStrategy())``: an ordinary LightningModule, trained by Deep Feedback Control."""

from __future__ import annotations

import atexit
import gc
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, StrategyRegistry
from typing_extensions import override

from dfc_lightning.training.resuming import ResumableTraining


class DFCStrategy(ResumableTraining, SingleDeviceStrategy):
    """Trains on one device by a rule that replaces backpropagation.

    The module stays as it is: its ``training_step`` returns a loss, its optimizer and schedulers do what they do.
    Only what ``loss.backward()`` leaves in ``.grad`` is another: the rule's update, in gradient units. Feedback
    weights learn in passes of their own over the training data, before the first batch of an epoch, and after batches.

    Without arguments it trains by ``LayeredDFC()``, whose feedback weights B_i are learned in a mirror phase and then
    track the weights. An argument that is None is what the rule has by default: feedback learning is ``rule.learning``,
    or that of its kind of feedback weights, which start as ``rule.feedback`` says; ``repr`` of the strategy's ``rule``
    and ``learning`` tells them. All arguments are those of :meth:`ControlledTraining.__init__`, below.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(max_epochs=1, strategy=DFCStrategy(), logger=False, enable_checkpointing=False)
    """

    strategy_name = "dfc"

    # One device, whichever the trainer has chosen

    @property
    def parallel_devices(self) -> list[torch.device]:
        """Where the trainer puts the devices it has found; set by Lightning."""
        return []

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        if not devices:
            return
        if len(devices) > 1:
            raise ValueError(
                f"devices={len(devices)} is not possible with DFCStrategy, which trains on one device: give "
                "Trainer(devices=1), or strategy='dfc_ddp' to train on all of them."
            )
        self._root_device = torch.device(devices[0])


class DFCDDPStrategy(ResumableTraining, DDPStrategy):
    """Trains on several devices, a process each, as :class:`DFCStrategy` does on one.

    Forward updates are averaged in DistributedDataParallel's own buckets, the feedback weights' gradients in one flat
    reduction; noise is drawn for the global batch and dealt to the ranks. So n processes equal one on the joint batch,
    where the ranks' batches are of equal size.

    The arguments are those of :meth:`ControlledTraining.__init__`, below, and of Lightning's ``DDPStrategy``.
    """

    strategy_name = "dfc_ddp"

    @override
    def setup_environment(self) -> None:
        ours = not dist.is_initialized()
        super().setup_environment()
        if ours:
            atexit.unregister(_leave_process_group)
            atexit.register(_leave_process_group)


def _leave_process_group() -> None:
    """Ends the group's threads while there is an interpreter: gloo's abort a process that exits with a tensor in hand.

    Lightning does so for NCCL alone.
    """
    gc.collect()  # DistributedDataParallel is part of cycles, and holds the group
    if dist.is_initialized():
        dist.destroy_process_group()


def _register(name: str, strategy: type, description: str, **arguments: Any) -> None:
    StrategyRegistry.register(name, strategy, description=description, override=True, **arguments)


_register("dfc", DFCStrategy, "Deep Feedback Control on one device")
_register("dfc_ddp", DFCDDPStrategy, "Deep Feedback Control on several devices")
_register("dfc_ddp_spawn", DFCDDPStrategy, "The same, with processes started by spawn", start_method="spawn")
