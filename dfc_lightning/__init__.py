"""Deep Feedback Control and other bio-plausible learning rules for PyTorch Lightning."""

from dfc_lightning.control.checks import ControlError
from dfc_lightning.control.controller import PIController
from dfc_lightning.control.network import ControlledNetwork
from dfc_lightning.control.target import ClampedTarget, NudgedTarget
from dfc_lightning.feedback_learning import Expected, FeedbackLearner, FeedbackLearning, Sampled
from dfc_lightning.rules import DFA, DFC, Backprop, LearningRule, MinimumNorm

try:
    from dfc_lightning.training import DFCDDPStrategy, DFCStrategy
    from dfc_lightning.twin import serve_both_names

    serve_both_names()
except ModuleNotFoundError as error:  # the rules themselves need no Lightning
    if not (error.name or "").startswith(("lightning", "tqdm")):
        raise

__version__ = "0.1.0"

__all__ = [
    "DFA",
    "DFC",
    "Backprop",
    "ClampedTarget",
    "ControlError",
    "ControlledNetwork",
    "DFCDDPStrategy",
    "DFCStrategy",
    "Expected",
    "FeedbackLearner",
    "FeedbackLearning",
    "LearningRule",
    "MinimumNorm",
    "NudgedTarget",
    "PIController",
    "Sampled",
]
