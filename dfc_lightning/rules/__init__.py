"""How a teaching signal is made: one rule a file."""

from dfc_lightning.network.learning_rule import Control, Direct, Layerwise, LearningRule, Update
from dfc_lightning.rules.backprop import Backprop
from dfc_lightning.rules.dfa import DFA
from dfc_lightning.rules.dfc import DFC
from dfc_lightning.rules.minimum_norm import MinimumNorm

__all__ = [
    "DFA",
    "DFC",
    "Backprop",
    "Control",
    "Direct",
    "Layerwise",
    "LearningRule",
    "MinimumNorm",
    "Update",
]
