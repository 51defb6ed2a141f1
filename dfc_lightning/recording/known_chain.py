"""Hooks on the layers of a known chain: its passes need no record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dfc_lightning.errors import ControlError
from dfc_lightning.recording.beside import (
    Step,
    cut,
    input_of,
    only_aside,
    only_without_gradients,
    wants_input_gradient,
    with_guard,
)
from dfc_lightning.recording.points import ControlPoint
from dfc_lightning.recording.refusals import called_twice, not_reached
from dfc_lightning.recording.structure import Link


class KnownChain:
    """One forward pass of a known chain; :meth:`passed` is a hook of every layer.

    Args:
        points: the layers, in the order in which they are to be passed.
        links: what lies between each and the next.
        at_output: called with the layers' inputs, their voltages and the output; what it returns takes its place.
    """

    def __init__(
        self,
        points: Sequence[ControlPoint],
        links: Sequence[Link],
        at_output: Callable[[list[Tensor], list[Tensor], Tensor], Tensor],
    ) -> None:
        self.points, self.links, self.at_output = points, links, at_output
        self.inputs: list[Tensor] = []
        self.voltages: list[Tensor] = []
        self.step, self.aside = Step(), False
        self.silent: set[str] = set()
        self._with_grad = torch.is_grad_enabled()

    def before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the first layer: a call for the gradient by the input is left to autograd."""
        if torch.is_grad_enabled() != self._with_grad:
            return None
        return with_guard(self.points[0].name, args, kwargs, self.step)

    def passed(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Forward hook: note what went in and out, and hand the output on without its history."""
        if torch.is_grad_enabled() != self._with_grad:
            self.silent.update(p.name for p in self.points if p.layer is layer)
            return output  # a call beside the one that is taught: a pseudo-label, a look at something
        place = next(k for k, p in enumerate(self.points) if p.layer is layer)
        point, received = self.points[place], input_of(args, kwargs)
        if wants_input_gradient(point.name, received):
            self.aside = True
            return output
        if place < len(self.inputs):
            raise called_twice(point.name)
        if place > len(self.inputs):
            raise ControlError(
                f"The layer {point.name!r} is called in another order than in the first step. The layers of a "
                "controlled chain follow each other the same way in every step."
            )
        if output.dim() != 2:
            raise ControlError(
                f"The layer {point.name!r} returns the shape {tuple(output.shape)}, but (B, n_out) in the first step. "
                "The layers of a controlled chain see inputs of one shape in every step."
            )
        self.inputs.append(received.detach())
        voltage = output.detach()
        self.voltages.append(voltage.clone() if self.links[place].overwrites else voltage)
        if len(self.inputs) < len(self.points):
            return cut(output, point.name)
        if output.device.type == "cpu":  # elsewhere the host would wait
            self._check_links()
        return self.at_output(self.inputs, self.voltages, output)

    def _check_links(self) -> None:
        """See, on one sample, that what lies between the layers still is what it was."""
        rows = [r[:1] for r in self.inputs[1:]]
        with torch.no_grad():
            expected = [link.nonlinearity(v[:1]) for link, v in zip(self.links, self.voltages[:-1])]
            if all(e.shape == r.shape for e, r in zip(expected, rows)) and (
                not rows or _alike(torch.cat(expected, 1), torch.cat(rows, 1))
            ):
                return
        k = next(k for k, (e, r) in enumerate(zip(expected, rows)) if e.shape != r.shape or not _alike(e, r))
        raise ControlError(
            f"What lies between the layers {self.points[k].name!r} and {self.points[k + 1].name!r} is another function "
            "than in the first step: a number in it has changed, or a branch. A chain keeps what it has shown at "
            "first; compute with tensors, such as a buffer that is written in place, or torch.where."
        )

    def check_complete(self) -> None:
        """Complain of layers that the pass did not reach."""
        if self.aside and not self.inputs:
            raise only_aside()
        if len(self.inputs) < len(self.points):
            names, some = [p.name for p in self.points[len(self.inputs) :]], bool(self.inputs)
            raise only_without_gradients(names) if self.silent.issuperset(names) else not_reached(names, some)

    def close(self) -> None:
        """Let go of what was noted."""
        self.inputs, self.voltages = [], []
        self.step.open = False


def _alike(expected: Tensor, found: Tensor) -> bool:
    """Whether rates differ by rounding alone; one look for the host."""
    exact = found.dtype in (torch.float32, torch.float64)
    return torch.allclose(expected.to(found), found, 1e-3 if exact else 0.1, 1e-5 if exact else 0.05, equal_nan=True)
