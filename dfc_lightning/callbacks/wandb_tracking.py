from __future__ import annotations

import json
import math
from dataclasses import fields, is_dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning_utilities.core.imports import RequirementCache
from torch import Tensor
from typing_extensions import override

from dfc_lightning.errors import ControlError, require
from dfc_lightning.rules import Backprop
from dfc_lightning.training.controlled import ControlledTraining

FEEDBACK = ("feedback/norm", "feedback/grad_norm")
"""What is drawn over feedback steps."""


class WandbTracking(Callback):
    """Tracks training in Weights & Biases, beside the trainer's own loggers, by Lightning's ``WandbLogger``.

    It makes the logger when training starts, not before: then it is known whether a checkpoint is resumed, whose run
    then goes on. What is added to what the logger does:

    - metrics ``feedback/*`` have ``feedback/step`` as their axis, all others ``trainer/global_step``;
    - the run's configuration holds, under ``strategy``, the rule with its settling and controller, feedback learning
      and the seed as they are in effect, and beside it all that the ``dfc`` command was given;
    - the run's summary holds the best value of what the first monitoring ``ModelCheckpoint`` monitors, as
      ``best/<metric>``, its epoch, as ``best/epoch``, and what a test of that checkpoint gives, as ``best/test/…``;
    - the dashboard of the run, ``dashboard``, drawn at the end of training where the trainer has a ``CSVLogger`` too;
    - histograms of the weights and the feedback weights, ``W/<layer>`` and ``Q/<layer>``, if asked for.

    Args:
        histograms_every_n_steps: number of optimizer steps from one set of histograms to the next; 0 for none.
        id: of the run; None to go on in that of the checkpoint, or else to start a new one.
        **kwargs: for ``WandbLogger``, and by it for ``wandb.init``, e.g. ``project``, ``name``, ``group``, ``tags``.

    Example:
        >>> import lightning as L
        >>> from dfc_lightning import DFCStrategy
        >>> trainer = L.Trainer(
        ...     max_epochs=1,
        ...     strategy=DFCStrategy(),
        ...     callbacks=[WandbTracking(project="digits", histograms_every_n_steps=100)],
        ...     logger=False,
        ...     enable_checkpointing=False,
        ... )
    """

    def __init__(self, histograms_every_n_steps: int = 0, id: str | None = None, **kwargs: Any) -> None:
        if not RequirementCache("wandb"):
            raise ModuleNotFoundError(
                'WandbTracking needs wandb, which is not installed: pip install "dfc_lightning[recipes]"'
            )
        require(
            histograms_every_n_steps >= 0,
            "histograms_every_n_steps",
            histograms_every_n_steps,
            "give a number of steps, or 0 for no histograms",
        )
        self.every, self.id = histograms_every_n_steps, id
        self._arguments = kwargs  # on a line of its own, where jsonargparse finds that they are WandbLogger's
        self.logger: WandbLogger | None = None
        self.best: tuple[float, int] | None = None  # value and epoch
        self._run_id: str | None = None
        self._drawn = -1
        self._loaded_epoch: int | None = None  # of the checkpoint that is resumed or tested

    # The run

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if any(isinstance(logger, WandbLogger) and logger is not self.logger for logger in trainer.loggers):
            raise ControlError(
                "WandbTracking makes a WandbLogger of its own, and the trainer has one already. Give the arguments of "
                "that to WandbTracking, and leave it out."
            )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._open(trainer)
        if trainer.is_global_zero:
            self._run.config.update(_configuration(trainer, pl_module), allow_val_change=True)
            self._summarise(trainer)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.id or self._run_id:  # the run that made the checkpoint; none is made for a test alone
            self._open(trainer)

    def _open(self, trainer: pl.Trainer) -> None:
        if self.logger is not None and self.logger in trainer.loggers:
            return
        self.logger = WandbLogger(id=self.id or self._run_id, **self._arguments)
        if trainer.is_global_zero:
            import wandb

            try:
                run = self._run
            except wandb.errors.Error as error:
                raise ControlError(
                    "Weights & Biases cannot be reached with an account: set WANDB_API_KEY, or run `wandb login`, or "
                    f"set WANDB_MODE=offline to upload later or WANDB_MODE=disabled to do without. It says: {error}"
                ) from error
            if not run.disabled:
                self._run_id = run.id
            run.define_metric("feedback/step")
            for name in FEEDBACK:  # by name: of "feedback/*" and the logger's "*", W&B applies either
                run.define_metric(name, step_metric="feedback/step")
        trainer.loggers = [*trainer.loggers, self.logger]

    @property
    def _run(self) -> Any:
        assert self.logger is not None
        return self.logger.experiment

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"id": self._run_id, "best": self.best}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._run_id, self.best = state_dict["id"], state_dict["best"]

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._loaded_epoch = checkpoint["epoch"]

    # What is recorded

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        step = trainer.global_step
        due = self.every and step and step % self.every == 0 and step != self._drawn  # once for accumulated batches
        if not due or not trainer.is_global_zero:
            return
        import wandb

        self._drawn = step
        weights = {f"W.{n.removesuffix('.weight')}": p for n, p in pl_module.named_parameters() if p.dim() > 1}
        network = trainer.strategy.network if isinstance(trainer.strategy, ControlledTraining) else None
        if network is not None:
            weights |= {f"Q.{point.name}": q for point, q in zip(network.points, network.feedback) if q.numel()}
        histograms = {name.replace(".", "/"): wandb.Histogram(_array(weight)) for name, weight in weights.items()}
        self._run.log({**histograms, "trainer/global_step": step})

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        checkpoint, fitting = _monitoring(trainer), trainer.state.fn == TrainerFn.FITTING
        if not fitting or trainer.sanity_checking or checkpoint is None:
            return
        value = float(trainer.callback_metrics.get(str(checkpoint.monitor), math.nan))
        sign = 1 if checkpoint.mode == "max" else -1
        if sign * value > (-math.inf if self.best is None else sign * self.best[0]):
            self.best = (value, trainer.current_epoch)
            if trainer.is_global_zero:
                self._summarise(trainer)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        table = next((logger for logger in trainer.loggers if isinstance(logger, CSVLogger)), None)
        if table is None or self.logger is None or not trainer.is_global_zero:
            return
        try:
            from dfc_lightning.plots import dashboard, read_run

            table.save()
            figure = dashboard([read_run(table.log_dir)])
        except (ControlError, FileNotFoundError, ImportError) as error:  # no reason to lose what comes after training
            rank_zero_warn(f"Weights & Biases gets no dashboard of this run: {error}")
            return
        self.logger.log_image("dashboard", [figure], trainer.global_step)

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.logger is None or not trainer.is_global_zero or not trainer.ckpt_path:
            return
        if self._run.summary.get("best/epoch") == self._loaded_epoch:
            self._run.summary.update({f"best/{name}": float(v) for name, v in trainer.callback_metrics.items()})

    def _summarise(self, trainer: pl.Trainer) -> None:
        checkpoint = _monitoring(trainer)
        if checkpoint is not None and self.best is not None:
            self._run.summary.update({f"best/{checkpoint.monitor}": self.best[0], "best/epoch": self.best[1]})


def _monitoring(trainer: pl.Trainer) -> ModelCheckpoint | None:
    found = (c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor)
    return next(found, None)


def _array(weight: Tensor) -> Any:
    return weight.detach().to("cpu", torch.float64).numpy()


def _configuration(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    """What distinguishes this run from others; not at the top what may be named as one of the module's parameters."""
    found: dict[str, Any] = {"model": _spelled(module), "data": _spelled(trainer.datamodule)}  # type: ignore[attr-defined]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SaveConfigCallback):
            found |= json.loads(callback.parser.dump(callback.config, format="json"))
    strategy, name = trainer.strategy, {"class": type(trainer.strategy).__name__}
    if not isinstance(strategy, ControlledTraining):
        return {**found, "strategy": {**name, "rule": _spelled(Backprop())}}
    assert strategy.network is not None
    in_effect = {
        "rule": _spelled(strategy.rule),
        "feedback": _spelled(strategy.learning),
        "feedback_init": strategy.feedback_init or getattr(strategy.rule.feedback, "init", None),
        "loss_reduction": strategy.loss_reduction,
        "seed": strategy.network.seed,
        "widths": [point.width for point in strategy.network.points],
    }
    return {**found, "strategy": {**name, **in_effect}}


def _spelled(thing: Any) -> Any:
    """A dataclass as a nested dict that names the classes; other objects by their class."""
    if is_dataclass(thing):
        return {"class": type(thing).__name__, **{f.name: _spelled(getattr(thing, f.name)) for f in fields(thing)}}
    plain = thing is None or isinstance(thing, (bool, int, float, str, tuple, list))
    return thing if plain else {"class": type(thing).__name__}
