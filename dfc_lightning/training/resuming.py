"""Feedback weights, their learning and its stages in the trainer's checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from dfc_lightning.training.checkpoint import (
    CHECKPOINT_KEY,
    optimizers_checked,
    read_checkpoint,
    rehearse,
    rehearse_trainer,
)
from dfc_lightning.training.controlled import ControlledTraining


class ResumableTraining(ControlledTraining):
    """Controlled training that goes on from its checkpoints; one that does not fit changes nothing."""

    _before_loading: dict[str, Any] | None = None
    """The module's state, until a checkpoint is loaded whole."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self.network is not None:
            checkpoint[CHECKPOINT_KEY] = {
                "seed": self.network.seed,
                "feedback": self.network.state_dict(),
                "outputs_at": list(self.network.outputs_at),
                "trainable": [n for n, p in self.network.module.named_parameters() if p.requires_grad],
                "learner": None if self.learner is None else self.learner.state_dict(),
                "stages": None if self.stages is None else self.stages.progress.state_dict(),
                "tracking": None if self.tracking is None else self.tracking.state_dict(),
            }
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return read_checkpoint(super().load_checkpoint, checkpoint_path, *args, **kwargs)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module = self.lightning_module
        assert module is not None
        fitting = module.trainer.state.fn == TrainerFn.FITTING
        rehearse_trainer(checkpoint, module.trainer, fitting)
        if fitting:
            if checkpoint.get(CHECKPOINT_KEY) is not None:
                _as_trainable(module, checkpoint[CHECKPOINT_KEY])
                rehearse(checkpoint, self.controlled(module), self.rule, self.learning)
            self._before_loading = copy.deepcopy(module.state_dict())
        if isinstance(self.precision_plugin, DoublePrecision):
            self.precision_plugin.convert_module(module)  # Lightning does so later, and the weights would be rounded
        super().load_model_state_dict(checkpoint, strict)

    @override
    def on_exception(self, exception: BaseException) -> None:
        if self._before_loading is not None and self.lightning_module is not None:
            self.lightning_module.load_state_dict(self._before_loading)  # nothing of what could not be loaded whole
        super().on_exception(exception)

    @override
    def teardown(self) -> None:
        self._before_loading = None
        super().teardown()

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self._trainer is not None
        with optimizers_checked(checkpoint, self._trainer):
            super().load_optimizer_state_dict(checkpoint)
        state = checkpoint.get(CHECKPOINT_KEY)
        assert self.lightning_module is not None
        if state is None:
            self._take_control(self.lightning_module)
            rank_zero_info("The checkpoint holds no feedback weights: they start anew, with the initial passes.")
            return
        if len(state["feedback"]) == 0:  # saved before the first forward pass, which sets them
            self._take_control(self.lightning_module, state["seed"])
        else:
            assert self.network is not None
            self.network.load_state_dict(state["feedback"], self.rule.feedback, state.get("outputs_at"))
            if self.seed is None:
                self.network.weights.seed = state["seed"]
            self._set_up_feedback(self.network)
        if state["learner"] is not None and self.rule.feedback is not None:
            self._descending().load_state_dict(state["learner"])
        self._tracked = state.get("tracking")
        if self.stages is not None and state["stages"] is not None:
            self.stages.progress.load_state_dict(state["stages"])

    @override
    def on_train_start(self) -> None:
        self._before_loading = None
        super().on_train_start()


def _as_trainable(module: pl.LightningModule, state: Any) -> None:
    """Let those parameters learn that did when a checkpoint was saved: a callback may have unfrozen some by then."""
    names = state.get("trainable") if isinstance(state, Mapping) else None
    parameters = dict(module.named_parameters())
    if names is None or not parameters.keys() >= set(names):  # of another network, as will be said
        return
    changed = [(n, p) for n, p in parameters.items() if p.requires_grad != (n in names)]
    for _, parameter in changed:
        parameter.requires_grad_(not parameter.requires_grad)
    if changed:
        rank_zero_info(
            f"{len(changed)} parameters are frozen or unfrozen as when the checkpoint was saved: "
            f"{', '.join(n for n, _ in changed[:4])}{' …' if len(changed) > 4 else ''}."
        )
