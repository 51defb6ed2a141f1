"""One forward pass of a batch, bound to the weights and feedback weights it was made with: what every rule works on."""

from __future__ import annotations

import contextlib
import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

from dfc_lightning.errors import ControlError
from dfc_lightning.losses.link import Link
from dfc_lightning.losses.linked_loss import Label, LinkedLoss
from dfc_lightning.passes.chance import Chance
from dfc_lightning.passes.plasticity import Plasticity


class Deviation(ABC):
    """How the controlled network deviates from feedforward."""

    driven: list[Tensor]
    """δv_i − δv_i^ff of each point, in the shape of its voltage: what the feedback drives it to beyond its input."""

    basal: list[Tensor]
    """δv_i^ff of each point, what its own input drives it to."""

    @property
    @abstractmethod
    def output(self) -> Tensor:
        """δr_L, (B, n_L)."""

    @abstractmethod
    def where(self, keep: Tensor, other: Any = None) -> Self:
        """This deviation for the samples of the mask ``keep``, (B,); ``other``, or none, for the rest."""


D = TypeVar("D", bound=Deviation)


class Unit(NamedTuple):
    """The size of JQ in each sample, along its own output error δ_L.

    Args:
        size: ‖JQ δ_L‖ / ‖δ_L‖, (B, 1); 1 for a sample in which either is zero.
        gained: JQ δ_L in this unit, (B, n_L).
        drive: ‖Q δ_L‖ over all points, (B, 1).
    """

    size: Tensor
    gained: Tensor
    drive: Tensor


def joint_norm(several: Sequence[Tensor]) -> Tensor:
    """The norm of each sample in all of several tensors, (B, …) each, as (B, 1)."""
    return torch.stack([torch.linalg.vector_norm(each.flatten(1), dim=1) for each in several]).norm(dim=0).unsqueeze(1)


def scaled(signals: Sequence[Tensor], sizes: Tensor) -> list[Tensor]:
    """Signals of the samples, (B, …) each, times a factor for each sample, (B,) or (B, 1)."""
    return [t * sizes.view(-1, *[1] * (t.dim() - 1)) for t in signals]


def gain_size(gained: Tensor, offset: Tensor) -> Tensor:
    """‖JQ δ_L‖ / ‖δ_L‖ of each sample, (B, 1), from both; 1 where either is zero."""
    size = torch.linalg.vector_norm(gained, dim=1, keepdim=True) / torch.linalg.vector_norm(offset, dim=1, keepdim=True)
    return torch.where(size.isfinite() & (size > 0), size, 1.0)


class ForwardPass(ABC, Generic[D]):
    """A feedforward pass over a batch of B samples through a network of L control points, and what can be asked of it.

    Voltages, errors and teaching signals are in the shape of a point's voltage, (B, n_i) or for maps (B, C, H, W). A
    point's *port* is what direct feedback reaches of it: each of its units, or for maps each channel if their feedback
    weights are shared between positions. Ports are flat, (B, n_i).

    ``feedback`` holds one tensor a point, by what the rule says it has: Q_i, (n_i, n_L), for ``Direct``; B_i, in the
    shape of W_i, for ``Layerwise`` (empty at points without a weight); nothing for rules without feedback weights.
    """

    dense: ClassVar[bool] = False
    """Whether the network is a chain of dense layers, whose closed forms are known."""

    feedback: Sequence[Tensor]
    v: list[Tensor]
    """Feedforward voltages v_i⁻, one (B, …) a point."""
    widths: Sequence[int]
    """n_i, the number of units of each port."""
    layered: bool
    """Whether feedback travels down layer by layer, through B_i."""
    unit: Unit | None
    """What the feedback of each sample is divided by, so that JQ is of size 1; None for 1."""
    chance: Chance
    """What a rule draws at random for this batch."""
    loss: LinkedLoss | None = None
    """What the loss was found to be, where a rule asks for it; see :meth:`label`."""
    reach: tuple[float, float] | None = None
    """β⁻, β⁺, where errors cross nonlinearities by [φ(v + β⁺ e) − φ(v − β⁻ e)] / (β⁺ + β⁻); None for φ'(v) e."""
    _held_jacobians: Callable[[], list[Tensor]] | None = None

    # What was fed forward

    @property
    @abstractmethod
    def output(self) -> Tensor:
        """The feedforward output r_L⁻, (B, n_L)."""

    @property
    @abstractmethod
    def slopes(self) -> list[Tensor]:
        """φ'(v_i⁻) of each point; zero for a unit that loses in max-pooling."""

    @property
    @abstractmethod
    def presynaptic(self) -> list[Tensor]:
        """r_{i−1}⁻, what each point's layer multiplies with its weights."""

    @property
    @abstractmethod
    def somata(self) -> Sequence[int]:
        """Number of points on the longest way from each point, itself included, to the output."""

    @property
    def outputs_at(self) -> list[int]:
        """Which points are the output: no other point lies between them and r_L.

        There are several where heads are summed, averaged or concatenated. The error of such a point is known where it
        is, without any feedback weights; see :meth:`output_errors`.
        """
        return [i for i, count in enumerate(self.somata) if count == 1]

    @property
    def depth(self) -> int:
        """L, the number of control points."""
        return len(self.widths)

    @property
    def batch_size(self) -> int:
        """B."""
        return self.output.shape[0]

    @property
    def outputs(self) -> int:
        """n_L."""
        return self.output.shape[1]

    @property
    def batched(self) -> bool:
        """Whether samples depend on each other, by a normalisation that has its statistics from the batch."""
        return False

    @property
    @abstractmethod
    def able(self) -> list[Tensor]:
        """1 for units of a port whose rate a push of their voltage can move, else 0: one (B, n_i) a point."""

    @abstractmethod
    def made_of(self) -> list[Tensor]:
        """The tensors that an update is made of, to see whether one has changed since."""

    def label(self, loss_grad: Tensor, link: Link | LinkedLoss | None = None) -> Label:
        """What the loss wants of the output, by which the error of any other output is known without asking the loss.

        Args:
            loss_grad: ∂ℓ_b/∂r_L of each sample's own loss, (B, n_L).
            link: the loss, or its g at a scale of 1; None for what it was found to be, :attr:`loss`.

        Raises:
            ControlError: the gradient tells no label, or nothing is known of the loss.
        """
        known = self.loss if link is None else link if isinstance(link, LinkedLoss) else LinkedLoss(link)
        if known is None:
            raise ControlError(
                "What the loss wants of the output is found by DFCStrategy, and was not here. Name the rule's link: "
                "'softmax' for cross entropy, 'identity' for half a squared error, or what dfc_lightning.find_link("
                "lambda output: loss(output, y), output) gives."
            )
        return known.told(self.output, loss_grad)

    # The same elsewhere

    @abstractmethod
    def samples(self, index: Tensor) -> Self:
        """The pass of some samples only; ``index`` as for a tensor's first dimension."""

    @abstractmethod
    def again(self) -> Self:
        """The pass of the same input with the weights as they are now, and the same masks and batch statistics."""

    def with_feedback(self, feedback: Sequence[Tensor], layered: bool = False) -> Self:
        """The same pass bound to other feedback weights: Q_i, or B_i if it is ``layered``."""
        return self._copy(feedback=feedback, layered=layered, unit=None)

    def with_chance(self, chance: Chance) -> Self:
        """The same pass with other random draws."""
        return self._copy(chance=chance)

    def with_loss(self, loss: LinkedLoss | None) -> Self:
        """The same pass with what its loss is known to be."""
        return self._copy(loss=loss)

    def widened(self, below: float, above: float | None = None) -> Self:
        """The same pass, whose errors cross nonlinearities by finite differences, β⁻ against and β⁺ = β⁻ along them."""
        return self._copy(reach=(below, below if above is None else above))

    def in_unit(self, offset: Tensor) -> Self:
        """The same pass with feedback divided by the size of JQ along δ_L = ``offset``, (B, n_L), in each sample."""
        driven = self.apical(offset)
        gained = self.linear_response(driven)
        size = gain_size(gained, offset)
        return self._copy(feedback=self.feedback, unit=Unit(size, gained / size, joint_norm(driven)))

    def _copy(self, **changed: Any) -> Self:
        same = copy.copy(self)
        vars(same).update(changed)
        for derived in ("stacked_feedback", "plain_output", "widths") if "feedback" in changed else ():
            same.__dict__.pop(derived, None)
        return same

    # Feedback, and what it does to the network

    @cached_property
    def stacked_feedback(self) -> Tensor:
        """All Q_i one above the other, (Σ n_i, n_L)."""
        return torch.cat(list(self.feedback))

    def apical(self, u: Tensor) -> list[Tensor]:
        """Apical voltages of a control signal u, (B, n_L), in the shape of the voltages.

        Q_i u; or by layered feedback (Meulemans et al. 2021, appendix) a_i = φ'(v_i) ⊙ B_{i+1}ᵀ a_{i+1}, each sample
        with its own slopes, masks and pooling: the errors that B pulls back, J_iᵀ u where B is W.
        """
        u = u if self.unit is None else u / self.unit.size
        return self.pull(u, through=self.feedback) if self.layered else self._direct(u)

    @abstractmethod
    def _direct(self, u: Tensor) -> list[Tensor]: ...

    @abstractmethod
    def spread(self, ports: Sequence[Tensor]) -> list[Tensor]:
        """What is given for the ports, (B, n_i), in the shape of the voltages."""

    @abstractmethod
    def gathered(self, errors: Sequence[Tensor]) -> list[Tensor]:
        """The transpose of :meth:`spread`: errors of the voltages, summed over the units of a port, (B, n_i)."""

    @abstractmethod
    def respond(self, driven: Sequence[Tensor]) -> D:
        """The controlled feedforward pass: each point is driven by ``driven`` beside its own input."""

    @abstractmethod
    def apart(self, driven: Sequence[Tensor]) -> D:
        """What apical voltages do to each point alone, what it hears staying feedforward."""

    # Linearised

    @abstractmethod
    def linear_response(self, driven: Sequence[Tensor]) -> Tensor:
        """First-order output deviation Σ_i J_i a_i, (B, n_L)."""

    @abstractmethod
    def pull(
        self,
        error: Tensor,
        through: Sequence[Tensor] | None = None,
        at: D | None = None,
        live: bool = False,
    ) -> list[Tensor]:
        """Errors J_iᵀ e of all points for an output error e, (B, n_L).

        Args:
            error: e.
            through: weights to pull it back through instead of W_i, one a point, of the same shapes; those of points
                without a weight are not looked at.
            at: a controlled state to take the derivatives at; None for the feedforward one.
            live: let batch statistics follow their batch, as backprop does, by the normalisation's derivative at the
                feedforward state, whose statistics they are; else they are held.
        """

    @abstractmethod
    def output_errors(self, error: Tensor) -> list[Tensor | None]:
        """J_iᵀ e of the points that are the output, None of all others: no error crosses a layer on its way there."""

    def jacobians(self) -> list[Tensor]:
        """J_i = ∂r_L/∂v_i by ports, one (B, n_L, n_i) a point."""
        return (self._held_jacobians or self._jacobians)()

    @contextlib.contextmanager
    def holding_jacobians(self) -> Iterator[None]:
        """Work the Jacobians out once, if any are asked for, for all who ask for them inside."""
        self._held_jacobians = functools.cache(self._jacobians)
        try:
            yield
        finally:
            self._held_jacobians = None

    def _jacobians(self) -> list[Tensor]:
        return self._rows()

    @abstractmethod
    def _rows(self, at: D | None = None, through: Sequence[Tensor] | None = None) -> list[Tensor]:
        """J_i by ports at a state, through W or other weights."""

    def feedback_rows(self) -> list[Tensor]:
        """What one unit of each control does to the apical voltages, K_iᵀ = ∂a_iᵀ/∂u, (B, n_L, n_i) by ports."""
        if self.layered:
            rows = self._rows(through=self.feedback)
        else:
            rows = [q.T.expand(self.batch_size, -1, -1) for q in self.feedback]
        return rows if self.unit is None else [r / self.unit.size.unsqueeze(2) for r in rows]

    def joint_feedback(self) -> Tensor:
        """All Q_i one above the other, (Σ n_i, n_L); where samples have each their own, K_i, (B, Σ n_i, n_L)."""
        if self.layered or self.unit is not None:
            return torch.cat(self.feedback_rows(), dim=2).mT
        return self.stacked_feedback

    def gain(self, at: D | None = None) -> Tensor:
        """JQ = Σ_i J_i Q_i, (B, n_L, n_L), at the feedforward or a controlled state; J_i K_i of layered feedback."""
        if self.layered:
            parts = zip(self._rows(at), self.feedback_rows())
            return sum((j @ k.mT for j, k in parts), start=self.output.new_zeros(()))
        found = self._direct_gain(at)
        return found if self.unit is None else found / self.unit.size.unsqueeze(2)

    @abstractmethod
    def _direct_gain(self, at: D | None) -> Tensor: ...

    @abstractmethod
    def mean_gain(self) -> Tensor:
        """JQ for the batch as a whole, (1, n_L, n_L), by direct feedback."""

    # Weights alone

    @property
    @abstractmethod
    def hears(self) -> Sequence[bool]:
        """Whether what a point hears depends on other points, so that errors travel back through its weight."""

    @abstractmethod
    def layer_weights(self) -> list[Tensor | None]:
        """W_i of each point, None of those without one."""

    @abstractmethod
    def passed_on(self, index: int, heard: Tensor) -> Tensor:
        """W_i r, what the weight of one point makes of r in the shape of its presynaptic rates; (B, …)."""

    @abstractmethod
    def one_forth(self, changes: Sequence[Tensor]) -> list[Tensor]:
        """What each layer hears of changes of the points' voltages, to first order, no change going through a point.

        Args:
            changes: one (B, …) a point, in the shape of its voltage; the answer is in the shape of what layers hear.
        """

    @abstractmethod
    def one_back(self, errors: Sequence[Tensor], through: Sequence[Tensor]) -> list[Tensor]:
        """The transpose of :meth:`one_forth` of what B_iᵀ makes of the errors of the layers, one layer back.

        Args:
            errors: one (B, …) a point, in the shape of what :meth:`passed_on` gives; of layers without a weight and of
                those that hear no other point they are not looked at.
            through: B_i, in the shape of W_i.
        """

    @abstractmethod
    def correlation(self, index: int, signal: Tensor, heard: Tensor) -> Tensor:
        """Σ_b t rᵀ in the shape of W_i, for t in the shape of what :meth:`passed_on` gives."""

    # From activity to updates

    @abstractmethod
    def postsynaptic(self, deviation: D, plasticity: Plasticity) -> list[Tensor]:
        """What the feedback changed in each point; see :data:`Plasticity`."""

    @abstractmethod
    def basal_drive(self, deviation: D) -> list[Tensor]:
        """W_i r_{i−1} of each point while the network is controlled: its basal voltage without the bias."""

    @abstractmethod
    def heard(self, deviation: D) -> list[Tensor]:
        """r_{i−1} while the network is controlled."""

    @abstractmethod
    def gradients(
        self, signals: Sequence[Tensor], heard: Sequence[Tensor] | None = None, scale: float = 1.0
    ) -> list[list[Tensor]]:
        """``scale`` times the batch mean of what each parameter is taught, for each point.

        Weights and biases by t_i r_{i−1}ᵀ and t_i; those of a normalisation by its local derivative at the feedforward
        state.

        Args:
            signals: teaching signals t_i in the shape of the voltages.
            heard: r_{i−1}; None for :attr:`presynaptic`.
            scale: of all.
        """
