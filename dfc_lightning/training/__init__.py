"""The Lightning layer: a strategy, an optimizer loop, and the feedback stages."""

from dfc_lightning.training.strategy import DFCDDPStrategy, DFCStrategy

__all__ = ["DFCDDPStrategy", "DFCStrategy"]
