"""How the controlled dynamics are divided into steps of time."""

# Annotations are not postponed here: jsonargparse would look them up in the modules of the subclasses.

from dataclasses import dataclass

from dfc_lightning.errors import require


@dataclass(frozen=True)
class TimeStep:
    """How a step of the dynamics is discretised.

    Args:
        dt: length of a step, in units of the controller's time constant τ_u.
        tau_ratio: somatic time constant τ_v / τ_u, at least ``dt``.
        apical_tau: apical time constant τ_A / τ_u, at least ``dt``; None for an instantaneous apical compartment.
        instant_transmission: rates of this step, not of the last, reach the next layer.
        instant_system: somata follow their compartments at once; implies ``instant_transmission``.
        proactive: the apical compartments hear the control of this step, not of the last.
    """

    dt: float = 0.02
    tau_ratio: float = 0.2
    apical_tau: float | None = None
    instant_transmission: bool = True
    instant_system: bool = False
    proactive: bool = True

    def __post_init__(self) -> None:
        require(self.dt > 0, "dt", self.dt, "give a step above zero, e.g. 0.02")
        require(self.dt <= 1, "dt", self.dt, "give a step of at most the controller's time constant, 1")
        remedy = f"the step dt={self.dt} is larger than this time constant; lower dt or raise it"
        require(self.instant_system or self.dt <= self.tau_ratio, "tau_ratio", self.tau_ratio, remedy)
        require(self.apical_tau is None or self.dt <= self.apical_tau, "apical_tau", self.apical_tau, remedy)

    @property
    def somatic_share(self) -> float:
        """The share of the way to its compartments that a soma goes in a step."""
        return 1.0 if self.instant_system else self.dt / self.tau_ratio

    @property
    def apical_share(self) -> float:
        """The same of the apical compartments on their way to Q_i u."""
        return 1.0 if self.apical_tau is None else self.dt / self.apical_tau

    @property
    def delayed(self) -> bool:
        """Whether rates reach the next layer a step later."""
        return not (self.instant_transmission or self.instant_system)
