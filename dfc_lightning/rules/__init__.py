"""How a teaching signal is made: one rule a file."""

from dfc_lightning.rules.backprop import Backprop
from dfc_lightning.rules.dfa import DFA
from dfc_lightning.rules.dfc import DFC
from dfc_lightning.rules.minimum_norm import MinimumNorm
from dfc_lightning.rules.rule import LearningRule, Update

__all__ = ["DFA", "DFC", "Backprop", "LearningRule", "MinimumNorm", "Update"]
