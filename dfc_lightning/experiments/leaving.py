"""A checkpoint of the moment at which a run is stopped, in the middle of an epoch or of a feedback pass too."""

from __future__ import annotations

import logging
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from dfc_lightning.experiments.going_on import LAST

ON_ERROR = "on_exception.ckpt"

_log = logging.getLogger(__name__)


class SaveOnLeaving(Callback):
    """Saves ``last.ckpt`` where the trainer keeps its checkpoints, when Ctrl-C or SIGTERM ends training.

    An error's state goes to ``on_exception.ckpt``, since it may be what has gone wrong. Nothing is saved before
    training starts, nor where the trainer keeps no checkpoints; by several processes only when all of them leave at
    the same batch, as SIGTERM has them do.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        """Of what was saved."""
        self._training = False

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._training = True

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._training = False

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        folder = next((c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)), None)
        stopped = isinstance(exception, (KeyboardInterrupt, SIGTERMException))
        together = trainer.world_size == 1 or isinstance(exception, SIGTERMException)
        if not self._training or folder is None or not together or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        # What is left of a validation would be its first batches again: it is run whole.
        trainer.fit_loop.epoch_loop.val_loop.batch_progress.current.reset()
        self._training, path = False, Path(folder) / (LAST if stopped else ON_ERROR)
        try:
            trainer.save_checkpoint(path)
        except Exception as error:  # what has stopped the run is told, whatever becomes of this
            _log.warning("The state at which the run was stopped could not be saved: %s", error)
            return
        self.path = path
        if not stopped:
            rank_zero_info(f"The state at the error is in {path}; dfc resume {path} goes on from it.")
