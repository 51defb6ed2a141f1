"""How the feedback weights are learned."""

from dfc_lightning.feedback_learning.learner import FeedbackLearner, FeedbackLearning
from dfc_lightning.feedback_learning.sampled import Sampled

__all__ = ["FeedbackLearner", "FeedbackLearning", "Sampled"]
