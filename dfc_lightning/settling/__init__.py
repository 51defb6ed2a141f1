"""How the controlled network reaches its state: one method a file."""

from dfc_lightning.settling.euler import Euler
from dfc_lightning.settling.linearized import Linearized
from dfc_lightning.settling.settled import Settled, Settling, Simulation
from dfc_lightning.settling.steady_state import SteadyState
from dfc_lightning.settling.trajectory import Trajectory

__all__ = ["Euler", "Linearized", "Settled", "Settling", "Simulation", "SteadyState", "Trajectory"]
