"""Callbacks: what looks at the learning without changing it, and the clipping of each layer."""

from dfc_lightning.callbacks.alignment_monitor import AlignmentMonitor
from dfc_lightning.callbacks.feedback_monitor import FeedbackMonitor
from dfc_lightning.callbacks.layer_clipping import LayerClipping
from dfc_lightning.callbacks.settling_monitor import SettlingMonitor
from dfc_lightning.callbacks.wandb_tracking import WandbTracking

__all__ = ["AlignmentMonitor", "FeedbackMonitor", "LayerClipping", "SettlingMonitor", "WandbTracking"]
