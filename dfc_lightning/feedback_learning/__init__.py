"""How the feedback weights are learned."""

from dfc_lightning.feedback_learning.expected import Expected
from dfc_lightning.feedback_learning.learner import EVERY_BATCH, FeedbackLearner, FeedbackLearning
from dfc_lightning.feedback_learning.method import FeedbackMethod
from dfc_lightning.feedback_learning.sampled import Sampled

__all__ = ["EVERY_BATCH", "Expected", "FeedbackLearner", "FeedbackLearning", "FeedbackMethod", "Sampled"]
