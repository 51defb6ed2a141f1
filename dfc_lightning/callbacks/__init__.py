"""Callbacks that look at the learning without changing it."""

from dfc_lightning.callbacks.alignment_monitor import AlignmentMonitor

__all__ = ["AlignmentMonitor"]
