"""The Lightning layer: a strategy, an optimizer loop, and the feedback stages."""

from dfc_lightning.training.loop import DFCOptimizerLoop
from dfc_lightning.training.strategy import DFCDDPStrategy, DFCStrategy

__all__ = ["DFCDDPStrategy", "DFCOptimizerLoop", "DFCStrategy"]
