"""Callbacks: what looks at the learning without changing it, the clipping of each layer, and threads."""

from dfc_lightning.callbacks.alignment_monitor import AlignmentMonitor
from dfc_lightning.callbacks.feedback_monitor import FeedbackMonitor
from dfc_lightning.callbacks.layer_clipping import LayerClipping
from dfc_lightning.callbacks.settling_monitor import SettlingMonitor
from dfc_lightning.callbacks.threads import ChooseThreads
from dfc_lightning.callbacks.wandb_tracking import WandbTracking
from dfc_lightning.training.control_summary import ControlSummary

__all__ = [
    "AlignmentMonitor",
    "ChooseThreads",
    "ControlSummary",
    "FeedbackMonitor",
    "LayerClipping",
    "SettlingMonitor",
    "WandbTracking",
]
