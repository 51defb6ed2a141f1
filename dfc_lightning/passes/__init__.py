"""One forward pass of a batch, bound to the weights and feedback weights it was made with."""

from dfc_lightning.passes.dense import DenseDeviation, DensePass, Layers
from dfc_lightning.passes.forward_pass import Deviation, ForwardPass
from dfc_lightning.passes.plasticity import PLASTICITIES, Plasticity
from dfc_lightning.passes.recorded import RecordedPass
from dfc_lightning.passes.recorded_deviation import RecordedDeviation

__all__ = [
    "PLASTICITIES",
    "DenseDeviation",
    "DensePass",
    "Deviation",
    "ForwardPass",
    "Layers",
    "Plasticity",
    "RecordedDeviation",
    "RecordedPass",
]
