"""Is the update a Gauss-Newton step, are the conditions met, is the control stable: metrics and their functions."""

from dfc_lightning.metrics.condition_one import ConditionOne, condition_one
from dfc_lightning.metrics.condition_two import ConditionTwo, condition_two
from dfc_lightning.metrics.control_effort import ControlEffort, control_effort
from dfc_lightning.metrics.control_ratio import ControlRatio, control_ratio
from dfc_lightning.metrics.feedback_angle import FeedbackAngle, feedback_angle
from dfc_lightning.metrics.gauss_newton import gauss_newton_update
from dfc_lightning.metrics.stability import (
    StabilityEigenvalue,
    control_matrix,
    instantaneous_matrix,
    stability_eigenvalue,
)
from dfc_lightning.metrics.update_angle import UpdateAngle, update_angle

__all__ = [
    "ConditionOne",
    "ConditionTwo",
    "ControlEffort",
    "ControlRatio",
    "FeedbackAngle",
    "StabilityEigenvalue",
    "UpdateAngle",
    "condition_one",
    "condition_two",
    "control_effort",
    "control_matrix",
    "control_ratio",
    "feedback_angle",
    "gauss_newton_update",
    "instantaneous_matrix",
    "stability_eigenvalue",
    "update_angle",
]
