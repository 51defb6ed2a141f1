"""Deep Feedback Control and other bio-plausible learning rules for PyTorch Lightning."""

import dfc_lightning.interrupts  # before what takes long to import  # noqa: F401

# isort: split
from dfc_lightning.errors import ControlError
from dfc_lightning.feedback_learning import (
    DifferenceReconstruction,
    Expected,
    ExpectedMirror,
    FeedbackLearner,
    FeedbackLearning,
    Sampled,
    SampledMirror,
    StrongSampled,
    Tracking,
)
from dfc_lightning.losses import Label, LinkedLoss, find_link
from dfc_lightning.network import ControlledNetwork
from dfc_lightning.passes import Deviation, ForwardPass
from dfc_lightning.rules import (
    DFA,
    DFC,
    Backprop,
    DifferenceTargetPropagation,
    Direct,
    DirectRandomTargetProjection,
    DualPropagation,
    FeedbackAlignment,
    ForwardGradient,
    KolenPollack,
    LayeredDFC,
    Layerwise,
    LearningRule,
    LeastControl,
    MinimumNorm,
    PredictiveCoding,
    SignSymmetry,
    StrongDFC,
    TwoPhaseStrongDFC,
    Update,
    WeightMirror,
)
from dfc_lightning.settling import ClampedTarget, NudgedTarget, PIController

try:
    from dfc_lightning.training import DFCDDPStrategy, DFCOptimizerLoop, DFCStrategy
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
    "DFCOptimizerLoop",
    "DFCStrategy",
    "Deviation",
    "DifferenceReconstruction",
    "DifferenceTargetPropagation",
    "Direct",
    "DirectRandomTargetProjection",
    "DualPropagation",
    "Expected",
    "ExpectedMirror",
    "FeedbackAlignment",
    "FeedbackLearner",
    "FeedbackLearning",
    "ForwardGradient",
    "ForwardPass",
    "KolenPollack",
    "Label",
    "LayeredDFC",
    "Layerwise",
    "LearningRule",
    "LinkedLoss",
    "LeastControl",
    "MinimumNorm",
    "NudgedTarget",
    "PIController",
    "PredictiveCoding",
    "Sampled",
    "SampledMirror",
    "SignSymmetry",
    "StrongDFC",
    "StrongSampled",
    "Tracking",
    "TwoPhaseStrongDFC",
    "Update",
    "WeightMirror",
    "find_link",
]
