"""What cannot be trained by feedback control, and the errors that say why and what to do."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelPruning

from dfc_lightning.errors import ControlError
from dfc_lightning.network.controlled_network import ControlledNetwork
from dfc_lightning.network.learning_rule import LearningRule
from dfc_lightning.training.loop import is_compiled, takes_loader_iterator

_BY_HAND = (
    "To step the optimizers yourself, as for a GAN, leave the strategy away and put one network under control: make "
    "ControlledNetwork(self.discriminator) in setup, compute its loss inside taught_by(DFC()), then call "
    "self.manual_backward(loss). docs/manual_optimization.md has an example that runs."
)


def refuse_manual_optimization(module: pl.LightningModule) -> None:
    """Raise a :class:`ControlError` if the module steps its optimizers itself."""
    if not module.automatic_optimization:
        raise ControlError(
            f"{type(module).__name__} has automatic_optimization=False. Feedback control replaces what "
            "loss.backward() computes inside Lightning's automatic optimization; let training_step return the "
            f"loss and leave the optimizer steps to Lightning. {_BY_HAND}"
        )


def refuse_compiled(module: pl.LightningModule) -> None:
    """Raise a :class:`ControlError` if the module, or a part of it, is compiled."""
    if is_compiled(module):
        raise ControlError(
            f"{type(module).__name__} is compiled, or something in it is. Compiled modules run past the hooks that "
            "feedback control needs, and would be trained by backprop; leave the module uncompiled until it is trained."
        )


def refuse_pruning(trainer: pl.Trainer) -> None:
    """Raise a :class:`ControlError` if layers are to be pruned while they are trained."""
    if any(isinstance(callback, ModelPruning) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise ControlError(
            "The callback ModelPruning makes weights anew from masks at each call. Feedback control teaches parameters "
            "as they are; leave the callback away, and prune when the module is trained."
        )


def refuse_settling(rule: LearningRule, network: ControlledNetwork) -> None:
    """Raise a :class:`ControlError` if the rule settles in a way that this network cannot."""
    settling = getattr(rule, "settling", None)
    if not network.may_be_dense and settling is not None and settling.chains_only:
        raise ControlError(
            f"settling={type(settling).__name__}(...) is for chains of dense layers; {type(network.module).__name__} "
            "has other layers. Simulate with settling=Euler(...), or take the steady state with "
            "settling=SteadyState() and integrate=False."
        )


def refuse_loader_iterator(trainer: pl.Trainer) -> None:
    """Raise a :class:`ControlError` if ``training_step`` draws its batches itself."""
    if takes_loader_iterator(trainer):
        raise ControlError(
            "training_step takes a dataloader_iter. Feedback passes need batches: give training_step the "
            "arguments (batch, batch_idx)."
        )


def several_optimizers() -> ControlError:
    """The error for a module that configures more than one optimizer."""
    return ControlError(
        "configure_optimizers returned several optimizers. Feedback control works with one; put the parameters "
        f"into one optimizer, in groups if their settings differ. {_BY_HAND}"
    )


def skipped_alone() -> ControlError:
    """The error for a batch skipped by one of several processes."""
    return ControlError(
        "training_step returned None. Among several processes no batch can be skipped, as the others "
        "would wait for this one; return a loss, or filter the data beforehand."
    )


def empty_alone() -> ControlError:
    """The error for an empty batch of one of several processes."""
    return ControlError(
        "A batch has no samples. Among several processes feedback learning needs some in each, as the others would "
        "wait for this one; leave out empty batches in the loader."
    )


def deaf_loss() -> ControlError:
    """The error for a loss that does not depend on the network's output."""
    return ControlError(
        "The loss does not depend on the network's output, so that nothing can be learned from it. Return from "
        "training_step a loss computed, without detach(), from what the network returned."
    )
