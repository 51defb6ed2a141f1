"""How the feedback weights are learned."""

from dfc_lightning.feedback_learning.expected import Expected
from dfc_lightning.feedback_learning.learner import EVERY_BATCH, MIRRORED, FeedbackLearner, FeedbackLearning
from dfc_lightning.feedback_learning.method import FeedbackMethod
from dfc_lightning.feedback_learning.mirror import ExpectedMirror, SampledMirror
from dfc_lightning.feedback_learning.reconstruction import DifferenceReconstruction
from dfc_lightning.feedback_learning.sampled import Sampled
from dfc_lightning.feedback_learning.strong_sampled import StrongSampled
from dfc_lightning.feedback_learning.tracking import Tracking

__all__ = [
    "EVERY_BATCH",
    "MIRRORED",
    "DifferenceReconstruction",
    "Expected",
    "ExpectedMirror",
    "FeedbackLearner",
    "FeedbackLearning",
    "FeedbackMethod",
    "Sampled",
    "SampledMirror",
    "StrongSampled",
    "Tracking",
]
