"""Callbacks that look at the learning without changing it."""

from dfc_lightning.callbacks.alignment_monitor import AlignmentMonitor
from dfc_lightning.callbacks.feedback_monitor import FeedbackMonitor
from dfc_lightning.callbacks.settling_monitor import SettlingMonitor
from dfc_lightning.callbacks.wandb_tracking import WandbTracking

__all__ = ["AlignmentMonitor", "FeedbackMonitor", "SettlingMonitor", "WandbTracking"]
