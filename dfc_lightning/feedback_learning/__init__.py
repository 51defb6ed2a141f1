"""How the feedback weights are learned."""

from dfc_lightning.feedback_learning.expected import Expected
from dfc_lightning.feedback_learning.learner import FeedbackLearner, FeedbackLearning
from dfc_lightning.feedback_learning.sampled import Sampled

__all__ = ["Expected", "FeedbackLearner", "FeedbackLearning", "Sampled"]
