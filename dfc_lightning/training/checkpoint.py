"""Finding out what is wrong with a checkpoint before any of it is loaded."""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from packaging.version import InvalidVersion, Version
from torch import Tensor
from torch.optim import Optimizer

from dfc_lightning.errors import ControlError
from dfc_lightning.feedback_learning.learner import FeedbackLearner, FeedbackLearning
from dfc_lightning.network.controlled_network import ControlledNetwork
from dfc_lightning.network.learning_rule import Layerwise, LearningRule
from dfc_lightning.training.stages import StageProgress

CHECKPOINT_KEY = "dfc_lightning"
_VERSION = "pytorch-lightning_version"
_OF_THE_SHAPE_OF_WEIGHTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "sum")


def read_checkpoint(read: Callable[..., Any], path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The checkpoint that ``read`` finds at ``path``.

    Raises:
        ControlError: the file is incomplete, or would run code, or is not a checkpoint of Lightning's.
    """
    try:
        checkpoint = read(path, *args, **kwargs)
    except FileNotFoundError:
        raise
    except Exception as error:  # unpickling what was never pickled ends in any
        reason = str(error).strip()
        foreign = re.search(r".*(\bglobal\b|unrecognized|type to build).*", reason, re.IGNORECASE)
        if foreign is not None:
            raise ControlError(
                f"The checkpoint {path} holds more than weights and numbers, and loading it could run code that comes "
                "with it. If you trust where it is from, load it by trainer.fit(…, weights_only=False), or by "
                f"torch.load, and save it again without that. Reading it gave: {foreign[0].strip()}"
            ) from error
        raise ControlError(
            f"The checkpoint {path} cannot be read, perhaps because it was not written to its end; resume from an "
            f"earlier one. Reading it gave: {reason}"
        ) from error
    missing = {"state_dict", _VERSION} - set(checkpoint if isinstance(checkpoint, Mapping) else ())
    if missing:
        raise ControlError(
            f"The file {path} is not a checkpoint written by a Trainer: it lacks {sorted(missing)}. Load weights "
            "saved by other means into the module before calling fit."
        )
    with _damage_named("state_dict"):
        if not isinstance(checkpoint["state_dict"], Mapping):
            raise TypeError(f"it is a {type(checkpoint['state_dict']).__name__}")
    with _damage_named(_VERSION):
        Version(checkpoint[_VERSION])  # Lightning chooses by it what to convert
    return checkpoint


def rehearse(
    checkpoint: Mapping[str, Any], network: ControlledNetwork, rule: LearningRule, learning: FeedbackLearning | None
) -> None:
    """Load feedback weights and learning, as saved in a checkpoint, into ``network``, which is thrown away afterwards.

    Raises:
        ControlError: they are not what this package saves, or belong to another network or other settings.
    """
    state = checkpoint[CHECKPOINT_KEY]
    try:
        missing = {"seed", "feedback", "learner", "stages"} - set(state)
        if missing:
            raise KeyError(f"it lacks {sorted(missing)}")
        _check_counter("seed", state["seed"], None)
        for name, q in state["feedback"].items():
            _check_values(f"The feedback weight of {name!r}", q)
        network.load_state_dict(state["feedback"], rule.feedback, state.get("outputs_at"))
        if state["learner"] is not None:
            _check_counter("steps", state["learner"]["steps"], 0)
        if learning is not None and state["learner"] is not None:
            FeedbackLearner(network, learning, int(state["seed"])).load_state_dict(state["learner"])
            for k, moments in ((state["learner"]["optimizer"] or {}).get("state", {})).items():
                for name in {"exp_avg", "exp_avg_sq"} & set(moments):
                    _check_values(f"{name} of feedback weight {k}", moments[name])
        tracks = isinstance(rule.feedback, Layerwise) and rule.feedback.tracking is not None
        if tracks and state.get("tracking") is not None:
            _check_tracking(state["tracking"], checkpoint.get("optimizer_states", []), state["feedback"])
        if state["stages"] is not None:
            _check_stages(StageProgress(**state["stages"]))
    except (ControlError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ControlError(
            f"What the checkpoint holds under {CHECKPOINT_KEY!r} does not fit this run. Resume with the network and "
            "the strategy it was saved with, or remove the entry to start feedback learning anew. In particular: "
            f"{error.args[0] if error.args else error}"
        ) from error


def _check_tracking(tracking: Any, optimizer_states: Sequence[Any], feedback: Mapping[str, Tensor]) -> None:
    """Of each optimizer, the state of that which goes its way for the feedback weights."""
    if not isinstance(tracking, Sequence) or len(tracking) != len(optimizer_states):
        raise ValueError(f"tracking is of {len(tracking)} optimizers, not of {len(optimizer_states)}")
    shapes = {tuple(b.shape) for b in feedback.values()}
    for own, leader in zip(tracking, optimizer_states):
        names = {name for each in leader["state"].values() for name in each}
        for k, moments in own.get("state", {}).items():
            if names and set(moments) != names:
                raise KeyError(
                    f"tracking is of another optimizer, whose state has {sorted(moments)}, not {sorted(names)}"
                )
            for name, value in moments.items():
                if isinstance(value, Tensor) and value.dim():
                    _check_values(f"tracking, {name} of {k},", value)
                    if tuple(value.shape) not in shapes:
                        raise ValueError(f"tracking, {name} of {k}, has the shape {tuple(value.shape)} of no weight")


def _check_values(what: str, values: Any) -> None:
    if not isinstance(values, Tensor) or not values.is_floating_point():
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{what} is of {kind}, not of floating point numbers")
    if not values.isfinite().all():
        bad = int((~values.isfinite()).sum())
        raise ValueError(f"{what} is not finite: {bad} of its {values.numel()} values are NaN or infinite")


def _check_counter(name: str, value: Any, least: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        wanted = "an integer" if least is None else f"an integer from {least} on"
        raise ValueError(f"{name}={value!r} is no count; it must be {wanted}")


def _check_stages(progress: StageProgress) -> None:
    for name, value in progress.state_dict().items():
        if name == "initial_done":
            if not isinstance(value, bool):
                raise TypeError(f"{name}={value!r} must be true or false")
        else:  # the last epoch and batch are -1 before there was one
            _check_counter(name, value, 0 if name in ("passes", "batches", "total_passes") else -1)


# What is Lightning's


def rehearse_trainer(checkpoint: Mapping[str, Any], trainer: pl.Trainer, fitting: bool) -> None:
    """See that callbacks, and in fit the loops, can take over what a checkpoint holds for them.

    Raises:
        ControlError: they cannot.
    """
    callbacks = checkpoint.get("callbacks")
    if callbacks is not None:
        with _damage_named("callbacks"):
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                state = callbacks.get(callback.state_key)
                if state:
                    with _damage_named(f"callbacks, {callback.state_key}"), warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # said when it is loaded in earnest
                        copy.copy(callback).load_state_dict(copy.deepcopy(state))
    loops = checkpoint.get("loops")
    if fitting and loops is not None:
        with _damage_named("loops"):
            _check_progress(trainer.fit_loop.state_dict(), loops["fit_loop"], "fit_loop")


@contextlib.contextmanager
def optimizers_checked(checkpoint: Mapping[str, Any], trainer: pl.Trainer) -> Iterator[None]:
    """Load optimizer states inside; they, and those of the schedulers, are then such as training can go on with.

    Raises:
        ControlError: they are not.
    """
    optimizers: Sequence[Optimizer] = trainer.strategy.optimizers
    # Schedulers add to the groups, and are restored after them.
    names = [set(group) - {"initial_lr"} for optimizer in optimizers for group in optimizer.param_groups]
    with _damage_named("optimizer_states"):
        yield
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for before, group in zip(names, groups):
            if before - set(group):
                raise KeyError(f"it is another optimizer's, without {sorted(before - set(group))}")
            if isinstance(group["lr"], bool) or not isinstance(group["lr"], (int, float, Tensor)):
                raise TypeError(f"lr={group['lr']!r} is no number")
        for optimizer in optimizers:
            for parameter, state in optimizer.state.items():
                for name in set(state) & set(_OF_THE_SHAPE_OF_WEIGHTS):
                    value = state[name]
                    if isinstance(value, Tensor) and value.shape != parameter.shape:
                        raise ValueError(f"{name} has the shape {tuple(value.shape)} for a {tuple(parameter.shape)}")
    with _damage_named("lr_schedulers"):
        states = checkpoint.get("lr_schedulers", [])
        if not isinstance(states, Sequence) or isinstance(states, str):
            raise TypeError(f"it is a {type(states).__name__}")
        for config, state in zip(trainer.lr_scheduler_configs, states):
            own = config.scheduler.state_dict()
            absent = {"last_epoch"} & set(own) - set(state)
            if absent:
                raise KeyError(f"it lacks {sorted(absent)}")
            if "last_epoch" in own:
                _check_counter("last_epoch", state["last_epoch"], 0)
            copy.copy(config.scheduler).load_state_dict(copy.deepcopy(state))


@contextlib.contextmanager
def _damage_named(entry: str) -> Iterator[None]:
    try:
        yield
    except ControlError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError, InvalidVersion) as error:
        reason = error.args[0] if error.args else type(error).__name__
        raise ControlError(
            f"What the checkpoint holds under {entry!r} does not fit this run, or is damaged. Resume with the module, "
            "optimizer and callbacks it was saved with, or from another checkpoint. In particular: "
            f"{reason if isinstance(reason, str) else repr(error)}"
        ) from error


def _check_progress(own: Mapping[str, Any], saved: Any, at: str) -> None:
    """Loops count in nested mappings; entries unknown to an older version may be missing."""
    if not isinstance(saved, Mapping):
        raise TypeError(f"{at} is a {type(saved).__name__}")
    for name, value in own.items():
        place = f"{at}, {name}"
        if name not in saved:
            if name in ("total", "current"):
                raise KeyError(f"{place} is missing")
        elif isinstance(value, Mapping):
            _check_progress(value, saved[name], place)
        elif isinstance(value, int) and not isinstance(value, bool):
            _check_counter(place, saved[name], 0)
