"""A loss whose gradient tells the label, ∂ℓ_b/∂r_L = c (g(r_L) − y), and the label that it tells of a batch."""

# Annotations are not postponed here: jsonargparse would look them up in the modules of the rules.

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dfc_lightning.errors import ControlError, require
from dfc_lightning.losses.link import LINKS, Link, change, linked, slope, tangent

ROUNDING = 0.05
"""By how much a label may leave the probabilities that it is to be, after gradients in bfloat16."""
HARD = 0.01
"""By how much a label may miss 0 and 1, for a sample's weight to be told with it."""


@dataclass(frozen=True)
class Label:
    """What the loss wants of the output in each sample, and how much it insists.

    Args:
        link: g.
        output: the feedforward output r_L⁻, (B, n_L).
        offset: the error there, y − g(r_L⁻), (B, n_L).
        scale: c, (B, 1), or of the outputs too, (B, n_L).
    """

    link: Link
    output: Tensor
    offset: Tensor
    scale: Tensor

    @property
    def label(self) -> Tensor:
        """y, (B, n_L)."""
        return linked(self.link, self.output) + self.offset

    def error(self, deviation: Tensor | None = None) -> Tensor:
        """The error e = y − g(r_L⁻ + δr_L), (B, n_L), of an output that deviates from the feedforward one by δr_L."""
        return self.offset if deviation is None else self.offset - change(self.link, self.output, deviation)

    def loss_grad(self, deviation: Tensor | None = None) -> Tensor:
        """∂ℓ_b/∂r_L = −c e at such an output, (B, n_L)."""
        return -self.scale * self.error(deviation)

    def slope(self, deviation: Tensor | None = None) -> Tensor:
        """∂g/∂r_L at such an output, (B, n_L, n_L)."""
        return slope(self.link, self.output if deviation is None else self.output + deviation)

    def grad_tangent(self, deviation: Tensor) -> Tensor:
        """What a small deviation changes ∂ℓ_b/∂r_L by, (B, n_L)."""
        return self.scale * tangent(self.link, self.output, deviation)

    def samples(self, index: Tensor) -> "Label":
        """That of some samples only; ``index`` as for a tensor's first dimension."""
        return Label(self.link, self.output[index], self.offset[index], self.scale[index])

    @property
    def weight(self) -> Tensor:
        """The scale c of each sample, (B, 1).

        Raises:
            ControlError: the outputs of a sample have different ones.
        """
        if self.scale.shape[1] > 1:
            raise ControlError(
                "The loss weighs the outputs of a sample differently, as pos_weight does, and this rule has one error "
                "for all of them. Give all outputs the same weight, or train by DFC(), which takes any loss."
            )
        return self.scale


@dataclass(frozen=True)
class LinkedLoss:
    """A loss with ∂ℓ_b/∂r_L = c (g(r_L) − y), ℓ_b each sample's own.

    Squared errors (identity), cross entropy of logits (softmax) and binary cross entropy of logits (sigmoid) are of
    this kind, times any factor. From the gradient of a batch alone y is known if c is; or if labels are hard, when
    each sample, and each output of binary cross entropy, may have a weight of its own.

    Args:
        link: g.
        scale: c > 0; 1 for half a squared error and for cross entropies summed over outputs. None where samples, or
            outputs of binary cross entropy, have each their own, which hard labels tell.
        hard: labels are 0 and 1. Of cross entropy with three outputs or more, samples that have such a label are
            then given the weight that it tells, and the others ``scale``.
    """

    link: Link = "softmax"
    scale: float | None = 1.0
    hard: bool = False

    def __post_init__(self) -> None:
        require(self.link in LINKS, "link", self.link, f"choose one of {LINKS}")
        sound = self.scale is None or 0 < self.scale < math.inf
        require(sound, "scale", self.scale, "give a finite factor above zero, or None if hard labels tell it")
        remedy = "without it labels have to be hard, hard=True, and of a cross entropy, link='softmax' or 'sigmoid'"
        told = self.scale is not None or (self.hard and self.link != "identity")
        require(told, "scale", self.scale, remedy)

    def told(self, output: Tensor, loss_grad: Tensor) -> Label:
        """The label behind a gradient.

        Args:
            output: r_L⁻, (B, n_L).
            loss_grad: ∂ℓ_b/∂r_L of each sample's own loss there, (B, n_L).

        Raises:
            ControlError: the labels are no probabilities, or not hard where they have to be.
        """
        if self.scale is None:
            found = _hard_label(self.link, output, loss_grad)
            sound = _misses(found, loss_grad) <= ROUNDING
        else:
            found = Label(self.link, output, loss_grad / -self.scale, output.new_full((len(output), 1), self.scale))
            if self.link == "identity":  # any label is as good as another
                return found
            y = found.label
            sound = (y > -ROUNDING) & (y < 1 + ROUNDING)
            if self.link == "softmax":
                sound &= (y.sum(1, keepdim=True) - 1).abs() < ROUNDING
            if self.hard and self.link == "softmax" and output.shape[1] > 2:  # of two, any label might be a hard one
                hard = _hard_label(self.link, output, loss_grad)
                fits = (_misses(hard, loss_grad) <= HARD).all(1, keepdim=True)
                pairs = zip((hard.offset, hard.scale), (found.offset, found.scale))
                found = Label(self.link, output, *(torch.where(fits, mine, other) for mine, other in pairs))
                sound |= fits
        if not bool(sound.all()):
            raise self._no_label(found, sound)
        return found

    def _no_label(self, found: Label, sound: Tensor) -> ControlError:
        name = "cross entropy" if self.link == "softmax" else "binary cross entropy"
        kind = f"at a scale of {self.scale:g}" if self.scale is not None else "with hard labels"
        sample = int((~sound.all(1)).int().argmax())
        return ControlError(
            f"The loss is not the {name} of the network's outputs as logits {kind}: the labels that its gradient "
            f"tells of would be {found.label[sample].tolist()} in sample {sample}. Give the rule link=None, by which "
            "it is found, link='identity' if the loss is half a squared error, or train by DFC(), which takes any loss."
        )


def check_link(link: Link | LinkedLoss | None) -> None:
    """Raise a ``ValueError`` if this is none that a rule can be given."""
    known = link is None or isinstance(link, LinkedLoss) or link in LINKS
    require(known, "link", link, f"choose one of {LINKS}, give a LinkedLoss, or None to have it found")


def _misses(label: Label, loss_grad: Tensor) -> Tensor:
    """By how much of c a label's gradient is not the one given, (B, n_L)."""
    return torch.nan_to_num((label.loss_grad() - loss_grad).abs() / label.scale)


def _hard_label(link: Link, output: Tensor, loss_grad: Tensor) -> Label:
    """Of hard labels the gradient's sign alone tells which output is to be 1; where it is zero nothing is wanted."""
    g = linked(link, output)
    if link == "softmax":
        hot = torch.zeros_like(g).scatter_(1, loss_grad.argmin(1, keepdim=True), 1.0)
        others = 1 - hot
        scale = (loss_grad * others).sum(1, keepdim=True) / (g * others).sum(1, keepdim=True)
        offset = torch.where(hot > 0, (g * others).sum(1, keepdim=True), -g)
    else:
        hot = (loss_grad < 0).to(g.dtype)
        offset = torch.where(hot > 0, linked(link, -output), -g)
        scale = -loss_grad / offset
    scale = torch.nan_to_num(scale, 0.0, 0.0, 0.0)
    return Label(link, output, torch.where(scale > 0, offset, 0.0), scale.clamp_min(0.0))
