"""Hooks on the layers of a chain that record one forward pass, and the first pass of a network that may be one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dfc_lightning.control.checks import ControlError
from dfc_lightning.control.nonlinearity import Identity, Nonlinearity
from dfc_lightning.control.points import ControlPoint
from dfc_lightning.control.trace import OperationRecorder
from dfc_lightning.control.watch import GraphWatch, called_twice, not_reached, refuse_history
from dfc_lightning.control.wiring import GraphActivity


class FirstWatch(GraphWatch):
    """The record of the first pass of a network of dense layers: a graph, and a chain if it is one.

    Args:
        points: see :class:`GraphWatch`.
        at_output: likewise, with the nonlinearities of the points of a chain, and whether they overwrite their
            voltages, or None where the network is none.
        dtype: likewise.
    """

    def __init__(
        self,
        points: Sequence[ControlPoint],
        at_output: Callable[..., Tensor],
        dtype: torch.dtype,
        fixed: Iterable[Tensor] = (),
    ) -> None:
        super().__init__(points, self._decide, dtype, fixed)
        self.recorder = OperationRecorder()
        self.modes = [self.recorder, self.tape]
        self.inputs: list[Tensor] = []
        self.voltages: list[Tensor] = []
        self._found: list[tuple[Nonlinearity, bool]] | None = []
        self._handed_on: Tensor | None = None
        self._at_decided = at_output

    def before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().before(layer, args, kwargs)
        received = args[0] if args else kwargs["input"]
        self.inputs.append(received.detach())
        if self._found is None or self._handed_on is None:
            return
        try:
            self._found.append(self.recorder.path(self._handed_on, received, self.voltages[-1], self.order[-1].name))
        except ControlError:
            self._found = None

    def passed(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if output.dim() != 2:
            self._found = None
        self.voltages.append(output.detach().clone())
        self._handed_on = super().passed(layer, args, kwargs, output)
        return self._handed_on

    def _decide(self, activity: GraphActivity, order: list[ControlPoint], output: Tensor) -> Tensor:
        last = self.passages[-1].target == activity.wiring.output
        found = [*self._found, (Identity(), False)] if self._found is not None and last else None
        if found is not None and len(found) != len(order):
            found = None
        return self._at_decided(self, activity, order, found, output)


class ChainWatch:
    """The record of one forward pass of a known chain; :meth:`passed` is a hook of every layer.

    Args:
        points: the layers, in the order in which they are to be passed.
        at_output: called with inputs, voltages, the nonlinearities found and the output; what it returns takes its
            place.
        check: record the operations between the layers, to find the nonlinearities.
    """

    def __init__(self, points: Sequence[ControlPoint], at_output: Callable[..., Tensor], check: bool) -> None:
        self.points, self.at_output = points, at_output
        self.recorder = OperationRecorder() if check else None
        self.inputs: list[Tensor] = []
        self.voltages: list[Tensor] = []
        self.modes = [] if self.recorder is None else [self.recorder]
        self.found: list[tuple[Nonlinearity, bool]] = []
        self.handed_on: Tensor | None = None

    def passed(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Forward hook: note what went in and out, and hand the output on without its history."""
        place = next(k for k, p in enumerate(self.points) if p.layer is layer)
        point, received = self.points[place], args[0] if args else kwargs["input"]
        if place < len(self.inputs):
            raise called_twice(point.name)
        if place > len(self.inputs):
            raise ControlError(
                f"The layer {point.name!r} is called in another order than in the first step. The layers of a "
                "controlled chain follow each other the same way in every step."
            )
        refuse_history(point.name, received)
        if output.dim() != 2:
            raise ControlError(
                f"The layer {point.name!r} returns the shape {tuple(output.shape)}, but (B, n_out) in the first step. "
                "The layers of a controlled chain see inputs of one shape in every step."
            )
        if self.recorder is not None and self.handed_on is not None:
            before, name = self.voltages[-1], self.points[place - 1].name
            self.found.append(self.recorder.path(self.handed_on, received, before, name))
        self.inputs.append(received.detach())
        voltage = output.detach()
        keep = self.recorder is not None or point.overwrites
        self.voltages.append(voltage.clone() if keep else voltage)
        if len(self.inputs) < len(self.points):
            self.handed_on = voltage
            return voltage
        return self.at_output(self.inputs, self.voltages, [*self.found, (Identity(), False)], output)

    def check_complete(self) -> None:
        """Complain of layers that the pass did not reach."""
        if len(self.inputs) < len(self.points):
            raise not_reached([p.name for p in self.points[len(self.inputs) :]], bool(self.inputs))
