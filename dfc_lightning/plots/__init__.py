"""The paper's figures, and a run's at a glance: functions that return a matplotlib ``Figure``."""

from dfc_lightning.plots.dashboard import dashboard
from dfc_lightning.plots.figure_1d import Recording, figure_1d, record
from dfc_lightning.plots.figure_2 import FeedbackPlane, feedback_plane, figure_2
from dfc_lightning.plots.figure_3 import figure_3
from dfc_lightning.plots.runs import Run, Series, read_run

__all__ = [
    "FeedbackPlane",
    "Recording",
    "Run",
    "Series",
    "dashboard",
    "feedback_plane",
    "figure_1d",
    "figure_2",
    "figure_3",
    "read_run",
    "record",
]
