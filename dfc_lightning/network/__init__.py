"""A module under control, and what a learning rule is to it."""

from dfc_lightning.network.controlled_network import ControlledNetwork
from dfc_lightning.network.gate import Lesson
from dfc_lightning.network.learning_rule import Control, Direct, Layerwise, LearningRule, Update

__all__ = ["Control", "ControlledNetwork", "Direct", "Layerwise", "Lesson", "LearningRule", "Update"]
