"""What the strategies share: teaching in place of backprop, feedback stages, and their state in checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from dfc_lightning.errors import require
from dfc_lightning.feedback_learning.learner import EVERY_BATCH, MIRRORED, FeedbackLearner, FeedbackLearning, Ranks
from dfc_lightning.feedback_learning.tracking import Tracking
from dfc_lightning.network.controlled_network import OUTPUTS, ControlledNetwork, Output
from dfc_lightning.network.gate import Lesson, LossReduction
from dfc_lightning.network.initial_feedback import FEEDBACK_INITS, FeedbackInit
from dfc_lightning.network.judging import judged
from dfc_lightning.network.learning_rule import Layerwise, LearningRule
from dfc_lightning.network.ports import CONV_FEEDBACK, ConvFeedback
from dfc_lightning.network.unseen import unseen
from dfc_lightning.passes.forward_pass import ForwardPass
from dfc_lightning.rules.layered_dfc import LayeredDFC
from dfc_lightning.training.checkpoint_io import WholeCheckpointIO
from dfc_lightning.training.control_summary import ControlSummary, with_summary
from dfc_lightning.training.health import alignment, heeds_size
from dfc_lightning.training.in_step import InStep
from dfc_lightning.training.logs import log, logs_at, settling_metrics
from dfc_lightning.training.loop import (
    DFCOptimizerLoop,
    as_trained_on,
    fast_forward,
    silenced,
    training_batches,
    training_loaders,
)
from dfc_lightning.training.loss_beside import BatchSkipped, find_loss, loss_beside, loss_of
from dfc_lightning.training.refusals import (
    deaf_loss,
    empty_alone,
    refuse_compiled,
    refuse_loader_iterator,
    refuse_manual_optimization,
    refuse_pruning,
    refuse_settling,
    several_optimizers,
    skipped_alone,
)
from dfc_lightning.training.sources import can_be_read_again, is_empty
from dfc_lightning.training.stages import FeedbackStages
from dfc_lightning.training.watch import WATCHES, LearningWatch, Watch
from dfc_lightning.twin import twin_for

BY_THE_RULE = FeedbackLearning(initial_passes=0, passes_per_epoch=0, clip_norm=None, weight_decay=0.0)
"""How feedback weights learn that a rule has updates for, where the user says nothing else."""


class ControlledTraining(InStep):
    """A strategy whose ``loss.backward()`` leaves a rule's update in ``.grad``, to be mixed with one of Lightning's."""

    def __init__(
        self,
        rule: LearningRule | None = None,
        feedback: FeedbackLearning | None = None,
        network: str | None = None,
        feedback_init: FeedbackInit | None = None,
        loss_reduction: LossReduction = "mean",
        seed: int | None = None,
        conv_feedback: ConvFeedback = "auto",
        extra_points: Sequence[str] = (),
        output: Output = "first",
        watch: Watch = "warn",
        **kwargs: Any,
    ) -> None:
        """Train by a learning rule.

        Args:
            rule: the learning rule; None for ``LayeredDFC()``.
            feedback: when and how the feedback weights learn; None for what the rule has by default, ``rule.learning``
                or else, of rules that learn them, ``MIRRORED`` for layerwise B_i, a mirror phase to begin with, and
                ``EVERY_BATCH`` for direct Q_i, a pass to begin with and then a step after every batch. One field of
                these: ``dataclasses.replace(EVERY_BATCH, initial_passes=3)``. Fixed feedback:
                ``FeedbackLearning(initial_passes=0, passes_per_epoch=0)``. Unused by rules without such weights.
            network: name of the submodule to control; None if all trainable parameters belong to it.
            feedback_init: initial feedback weights; None for what the rule is meant to have.
            loss_reduction: ``"mean"`` if the loss is a mean over the batch, ``"sum"`` if it is a sum.
            seed: seed of random feedback weights, noise, and the order of data in feedback passes; None to follow
                ``seed_everything``.
            conv_feedback: feedback of convolutions; see :class:`ControlledNetwork`.
            extra_points: names of further submodules to control as a whole; see :class:`ControlledNetwork`.
            output: ``"returned"`` for a network whose loss is of all that it returns; see :class:`ControlledNetwork`.
            watch: what to do when learning fails, by samples that do not settle, feedback that does not follow the
                network, updates of another size than backprop's, or a loss that rises: ``"warn"`` once a run of each,
                ``"stop"`` with an error, or ``"off"``.
            **kwargs: for the strategy it is mixed with.
        """
        if kwargs.get("checkpoint_io") is None:
            kwargs["checkpoint_io"] = WholeCheckpointIO()
        super().__init__(**kwargs)
        self.rule: LearningRule = LayeredDFC() if rule is None else rule
        kind = self.rule.feedback
        layered = isinstance(kind, Layerwise)
        if feedback is not None and (kind is None or (layered and not kind.learned)) and feedback.has_steps:
            # no error: one configuration may serve several rules
            rank_zero_info(f"{self.rule} has no feedback weights that learn from noise: feedback={feedback} is unused.")
            feedback = None
        if feedback is not None and feedback.has_steps:
            weights, instead = ("B_i", "ExpectedMirror()") if layered else ("Q_i", "Expected()")
            remedy = f"{type(self.rule).__name__} has feedback weights {weights}; give e.g. method={instead}"
            require(feedback.method.layered == layered, "feedback.method", feedback.method, remedy)
        self.learning: FeedbackLearning | None = feedback or self.rule.learning
        if self.learning is None and kind is not None and kind.learned:
            self.learning = MIRRORED if layered else EVERY_BATCH
        self.network_name, self.loss_reduction, self.seed = network, loss_reduction, seed
        require(conv_feedback in CONV_FEEDBACK, "conv_feedback", conv_feedback, f"choose one of {CONV_FEEDBACK}")
        self.conv_feedback: ConvFeedback = conv_feedback
        require(output in OUTPUTS, "output", output, f"choose one of {OUTPUTS}")
        self.extra_points, self.output = tuple(extra_points), output
        known = feedback_init is None or feedback_init in FEEDBACK_INITS
        require(known, "feedback_init", feedback_init, f"choose one of {FEEDBACK_INITS}")
        self.feedback_init = feedback_init
        require(watch in WATCHES, "watch", watch, f"choose one of {WATCHES}")
        self.watch: Watch = watch
        self._watching: LearningWatch | None = None
        self._loss: Tensor | None = None
        self.network: ControlledNetwork | None = None
        self.learner: FeedbackLearner | None = None
        self.stages: FeedbackStages | None = None
        self.tracking: Tracking | None = None
        self._tracked: Any = None  # as saved, until training starts
        self.lesson: Lesson | None = None
        self._batch_idx = 0
        self._known = False  # whether a batch has been run, by which the network is known
        self._shown = False  # whether its summary has been
        Lesson(self.rule, loss_reduction)  # checks the reduction before anything starts

    # Setting up

    @property
    def accelerator(self) -> Accelerator | None:
        """Which the trainer gives; set by Lightning."""
        return self._accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Accelerator) -> None:
        self.__class__ = twin_for(type(self), accelerator)  # the trainer may be of pytorch_lightning
        self._accelerator = accelerator

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._check(trainer)
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        module = self.lightning_module
        assert module is not None
        another, self._trainer, self._told = self._trainer is not trainer, trainer, False
        if self.network is None or self.network.module is not module:
            self._take_control(module)
        elif another and self.stages is not None:
            self.stages.progress.new_trainer()
        if self.network is not None:
            self.network.loss = None  # it may be another than the last time
        DFCOptimizerLoop(trainer, self._before_batch, self._after_batch).install()
        with_summary(trainer)
        self._shown = False

    def __repr__(self) -> str:
        told = [f"rule={self.rule}", f"learning={self.learning}"]
        told += [] if self.network_name is None else [f"network={self.network_name!r}"]
        told += [] if self.network is None else [repr(self.network)]
        return f"{type(self).__name__}({', '.join(told)})"

    def _check(self, trainer: pl.Trainer) -> None:
        module = self.lightning_module
        assert module is not None
        refuse_manual_optimization(module)
        refuse_compiled(module)
        refuse_pruning(trainer)
        refuse_settling(self.rule, self.controlled(module))  # raises too if the module cannot be controlled

    def _take_control(self, module: pl.LightningModule, seed: int | None = None) -> None:
        if self.seed is not None:
            seed = self.seed
        elif seed is None:
            seed = self.broadcast(torch.initial_seed())
        self.network, self._known = self.controlled(module, self.feedback_init, seed), False
        self.network.weights.average = self.reduce
        self.network.ranks = self._ranks.rank, self._ranks.world_size
        self._set_up_feedback(self.network)

    def controlled(
        self, module: pl.LightningModule, feedback_init: FeedbackInit | None = None, seed: int | None = None
    ) -> ControlledNetwork:
        """A controlled network of a module by this strategy's arguments."""
        return ControlledNetwork(
            module,
            self.network_name,
            feedback_init,
            seed,
            self.conv_feedback,
            extra_points=self.extra_points,
            output=self.output,
        )

    def _set_up_feedback(self, network: ControlledNetwork) -> None:
        self.learner = self.stages = None
        if self.learning is not None:
            self.learner = FeedbackLearner(network, self.learning, network.seed, self._ranks)
            self.stages = FeedbackStages(self.learning, self._feedback_step, network.seed, self._on_any)

    @property
    def _ranks(self) -> Ranks:
        assert self._trainer is not None
        return Ranks(self._trainer.global_rank, self._trainer.world_size, self.reduce)

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        try:
            super().setup_optimizers(trainer)
        except RuntimeError as error:  # Lightning's own remedy is manual optimization, which is none here
            if "multiple optimizers" not in str(error):
                raise
            raise several_optimizers() from error

    @override
    def on_train_start(self) -> None:
        assert self._trainer is not None
        super().on_train_start()
        self._watch_for_sigterm()
        self._watching = None if self.watch == "off" else LearningWatch(self.watch == "stop", self.reduce)
        refuse_loader_iterator(self._trainer)
        self._track()
        fast_forward(self._trainer)

    def _track(self) -> None:
        kind, network = self.rule.feedback, self.network
        if isinstance(kind, Layerwise) and kind.tracking is not None and network is not None:
            self.tracking = Tracking(network, self.optimizers, kind.tracking)
            if self._tracked is not None:
                self.tracking.load_state_dict(self._tracked)
        self._tracked = None

    @override
    def teardown(self) -> None:
        if self.tracking is not None:
            self.tracking.close()
            self.tracking = None
        super().teardown()

    # A training step

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.network is not None
        self.lesson = None
        if not self._known and is_empty(args[:1]) and self._ranks.world_size == 1:
            rank_zero_warn("The first batch has no samples, from which the network could be known. It is skipped.")
            return None
        assert self._trainer is not None
        self.network.lessons = (self._trainer.current_epoch << 32) + self._batch_idx  # also where a run goes on
        try:
            with self.network.taught_by(self.rule, self.loss_reduction) as lesson:
                looks = self._watching is not None and self._watching.looks_next
                lesson.weighs = looks and heeds_size(self.optimizers)
                output = super().training_step(*args, **kwargs)
                if output is None:
                    raise BatchSkipped
        except BatchSkipped:
            return None
        loss = loss_of(output)
        if isinstance(loss, Tensor):
            if not loss.requires_grad:
                raise deaf_loss()
            lesson.watch(loss)
            self._loss = loss.detach()
        self.lesson, self._known = lesson, True
        if lesson.forward is not None:
            self._show(lesson.forward)
        return output

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        super().post_backward(closure_loss)
        if self.lesson is not None and not self.lesson.taught:
            raise deaf_loss()

    def _show(self, forward: ForwardPass) -> None:
        """Tell of the control points, by the first pass."""
        if self._shown:
            return
        assert self._trainer is not None and self.network is not None
        self._shown = True
        for each in self._trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(each, ControlSummary):
                each.show(self, self.network, forward)

    # Feedback learning

    def _before_batch(self, batch: Any, batch_idx: int) -> None:
        assert self.lightning_module is not None and self._trainer is not None
        refuse_compiled(self.lightning_module)  # perhaps by a callback, since the start
        self._batch_idx = batch_idx
        stages, trainer = self.stages, self._trainer
        if trainer.world_size > 1:
            self._on_any([])
        self._find_loss(batch, batch_idx)
        if stages is None or not stages.due(trainer):
            return
        if all(can_be_read_again(loader) for loader in training_loaders(trainer)):
            stages.run(trainer, lambda number: training_batches(trainer, number), self._log_feedback)
        else:
            stages.run_in_hand(trainer, batch, batch_idx, self._log_feedback)

    def _after_batch(self, batch_idx: int) -> None:
        assert self._trainer is not None and self.network is not None
        if self._watching is not None and self.lesson is not None and self.lesson.taught:
            follows = self._follows(self.lesson) if self._watching.looks_next else None
            self._watching.step(self.lesson, self._loss, self.network.feedback, follows)
        settled = self.lesson.settled if self.lesson is not None else None
        if settled is not None and logs_at(self._trainer, self._trainer.fit_loop.total_batch_idx):
            log(self._trainer, settling_metrics(settled, self.reduce), self._trainer.global_step)
        every = self.learning.every_n_batches if self.learning is not None else 0
        taught = self.lesson.update.feedback if self.lesson is not None and self.lesson.update is not None else None
        if taught is not None:
            self._log_feedback(self._descending().descend(taught))
        if every and (batch_idx + 1) % every == 0 and self.lesson is not None and self.learner is not None:
            assert self.lesson.forward is not None
            if self._empty(self.lesson.forward):
                return
            with torch.no_grad():  # the weights have moved: a fresh pass of the same batch
                self._log_feedback(self.learner.step(self.lesson.forward.again()))

    def _follows(self, lesson: Lesson) -> Tensor | None:
        """How well feedback weights follow the network that have learned to, or are learning to."""
        learns = self.learning is not None and self.learning.has_steps  # tracking alone starts from anywhere
        assert lesson.forward is not None
        if not learns or lesson.forward.batch_size == 0:
            return None
        with torch.no_grad(), torch.autocast(lesson.forward.output.device.type, enabled=False):
            return alignment(lesson.forward)

    def _descending(self) -> FeedbackLearner:
        """What gives the feedback weights the updates that the rule has for them."""
        assert self.network is not None
        if self.learner is None:
            self.learner = FeedbackLearner(self.network, BY_THE_RULE, self.network.seed, self._ranks)
        return self.learner

    def _feedback_step(self, batch: Any, batch_idx: int, initial: bool, in_hand: bool) -> dict[str, Tensor]:
        module, network, learner, trainer = self.lightning_module, self.network, self.learner, self._trainer
        assert module is not None and network is not None and learner is not None and trainer is not None
        loss_grad: Tensor | None = None

        def run() -> Any:
            return loss_beside(trainer, batch, batch_idx)

        try:
            with unseen(module, [optimizer.param_groups for optimizer in self.optimizers]):
                with self.precision_plugin.train_step_context(), silenced(module):
                    if not in_hand:
                        batch = as_trained_on(trainer, batch)
                    if is_empty(batch) and trainer.world_size == 1:
                        return {}
                    if not in_hand and module.on_train_batch_start(batch, batch_idx) == -1:
                        raise BatchSkipped  # with it, training would leave the rest of the epoch
                    if self._loss_is_asked_for:  # the first batch was empty
                        find_loss(network, trainer, batch, batch_idx, self.loss_reduction)
                    if learner.learning.method.needs_loss:
                        forward, loss_grad = judged(network, run, self.rule.feedback, self.loss_reduction)
                    else:
                        forward = network.observing(run, self.rule.feedback)
        except BatchSkipped:
            if trainer.world_size > 1:
                raise skipped_alone() from None
            return {}
        if self._empty(forward):
            return {}
        self._show(forward)
        with torch.no_grad():
            return learner.step(forward, initial, loss_grad)  # outside the context: no autocast in the simulation

    def _find_loss(self, batch: Any, batch_idx: int) -> None:
        """Find what the loss wants of the output, before anything is learned, where there is one who asks for it."""
        module, network, trainer = self.lightning_module, self.network, self._trainer
        assert module is not None and network is not None and trainer is not None
        if not self._loss_is_asked_for or is_empty(batch):
            return
        try:
            with unseen(module, [optimizer.param_groups for optimizer in self.optimizers]):
                with self.precision_plugin.train_step_context(), silenced(module):
                    find_loss(network, trainer, batch, batch_idx, self.loss_reduction)
        except BatchSkipped:
            pass

    @property
    def _loss_is_asked_for(self) -> bool:
        """Whether what the loss wants of the output is still to be found."""
        asked = self.rule.asks_for_loss or (self.learning is not None and self.learning.method.asks_for_loss)
        return asked and self.network is not None and self.network.loss is None

    def _empty(self, forward: ForwardPass) -> bool:
        """Whether a batch has no sample to learn feedback from."""
        assert self._trainer is not None
        if forward.batch_size == 0 and self._trainer.world_size > 1:
            raise empty_alone()
        return forward.batch_size == 0

    def _log_feedback(self, metrics: dict[str, Tensor]) -> None:
        assert self.learner is not None and self._trainer is not None
        steps = self.learner.steps
        if metrics and logs_at(self._trainer, steps - 1):
            named = {f"feedback/{name}": value for name, value in metrics.items()}
            log(self._trainer, {**named, "feedback/step": float(steps)}, self._trainer.global_step, steps)
