"""How the controlled network reaches its state: one method a file."""

from dfc_lightning.settling.controller import PIController
from dfc_lightning.settling.dense_dynamics import Dynamics
from dfc_lightning.settling.equilibrium import Equilibrium
from dfc_lightning.settling.euler import Euler
from dfc_lightning.settling.inference import Descent, Inference
from dfc_lightning.settling.linearized import Linearized
from dfc_lightning.settling.recorded_dynamics import RecordedDynamics
from dfc_lightning.settling.settled import Settled, Settling, Simulation
from dfc_lightning.settling.steady_state import SteadyState
from dfc_lightning.settling.strong_simulation import StrongSimulation
from dfc_lightning.settling.target import ClampedTarget, NudgedTarget
from dfc_lightning.settling.trajectory import Trajectory

__all__ = [
    "ClampedTarget",
    "Descent",
    "Dynamics",
    "Equilibrium",
    "Euler",
    "Inference",
    "Linearized",
    "NudgedTarget",
    "PIController",
    "RecordedDynamics",
    "Settled",
    "Settling",
    "Simulation",
    "SteadyState",
    "StrongSimulation",
    "Trajectory",
]
