"""How a teaching signal is made: one rule a file."""

from dfc_lightning.network.learning_rule import Control, Direct, Layerwise, LearningRule, Update
from dfc_lightning.rules.backprop import Backprop
from dfc_lightning.rules.dfa import DFA
from dfc_lightning.rules.dfc import DFC
from dfc_lightning.rules.difference_target_propagation import DifferenceTargetPropagation
from dfc_lightning.rules.dual_propagation import DualPropagation
from dfc_lightning.rules.feedback_alignment import FeedbackAlignment
from dfc_lightning.rules.forward_gradient import ForwardGradient
from dfc_lightning.rules.kolen_pollack import KolenPollack
from dfc_lightning.rules.layered_dfc import LayeredDFC
from dfc_lightning.rules.least_control import LeastControl
from dfc_lightning.rules.minimum_norm import MinimumNorm
from dfc_lightning.rules.predictive_coding import PredictiveCoding
from dfc_lightning.rules.sign_symmetry import SignSymmetry
from dfc_lightning.rules.strong_dfc import StrongDFC, TwoPhaseStrongDFC
from dfc_lightning.rules.target_projection import DirectRandomTargetProjection
from dfc_lightning.rules.weight_mirror import WeightMirror

__all__ = [
    "DFA",
    "DFC",
    "Backprop",
    "Control",
    "DifferenceTargetPropagation",
    "Direct",
    "DirectRandomTargetProjection",
    "DualPropagation",
    "FeedbackAlignment",
    "ForwardGradient",
    "KolenPollack",
    "LayeredDFC",
    "Layerwise",
    "LearningRule",
    "LeastControl",
    "MinimumNorm",
    "PredictiveCoding",
    "SignSymmetry",
    "StrongDFC",
    "TwoPhaseStrongDFC",
    "Update",
    "WeightMirror",
]
