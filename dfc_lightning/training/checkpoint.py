"""Finding out what is wrong with a checkpoint before any of it is loaded."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import Any

from dfc_lightning.errors import ControlError
from dfc_lightning.feedback_learning.learner import FeedbackLearner, FeedbackLearning
from dfc_lightning.network.controlled_network import ControlledNetwork
from dfc_lightning.network.learning_rule import LearningRule
from dfc_lightning.training.stages import StageProgress

CHECKPOINT_KEY = "dfc_lightning"


def read_checkpoint(read: Callable[..., Any], path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The checkpoint that ``read`` finds at ``path``.

    Raises:
        ControlError: the file is incomplete, or not a checkpoint of Lightning's.
    """
    try:
        checkpoint = read(path, *args, **kwargs)
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ControlError(
            f"The checkpoint {path} cannot be read, perhaps because it was not written to its end; resume from an "
            f"earlier one. Reading it gave: {error}"
        ) from error
    missing = {"state_dict", "pytorch-lightning_version"} - set(checkpoint if isinstance(checkpoint, Mapping) else ())
    if missing:
        raise ControlError(
            f"The file {path} is not a checkpoint written by a Trainer: it lacks {sorted(missing)}. Load weights "
            "saved by other means into the module before calling fit."
        )
    return checkpoint


def rehearse(state: Any, network: ControlledNetwork, rule: LearningRule, learning: FeedbackLearning | None) -> None:
    """Load feedback weights and learning, as saved in a checkpoint, into ``network``, which is thrown away afterwards.

    Raises:
        ControlError: they are not what this package saves, or belong to another network or other settings.
    """
    try:
        missing = {"seed", "feedback", "learner", "stages"} - set(state)
        if missing:
            raise KeyError(f"it lacks {sorted(missing)}")
        network.load_state_dict(state["feedback"], rule.feedback, state.get("outputs_at"))
        if learning is not None and state["learner"] is not None:
            FeedbackLearner(network, learning, int(state["seed"])).load_state_dict(state["learner"])
        if state["stages"] is not None:
            StageProgress(**state["stages"])
    except (ControlError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ControlError(
            f"What the checkpoint holds under {CHECKPOINT_KEY!r} does not fit this run. Resume with the network and "
            "the strategy it was saved with, or remove the entry to start feedback learning anew. In particular: "
            f"{error.args[0] if error.args else error}"
        ) from error
