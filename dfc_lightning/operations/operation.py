"""How an operation between two control points passes deviations on, and errors back.

With x⁻ the feedforward value of its argument and δ what the control adds to it, an operation f has to give
f(x⁻ + δ) − f(x⁻) without losing the digits of a small δ. Linear operations are applied to δ itself, elementwise
nonlinearities have differences of their own (:mod:`.nonlinearity`), batch normalisation is an affine map with the
statistics of the feedforward pass, and everything else is subtracted in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dfc_lightning.operations.arguments import named, tensors_of, writes_into_argument
from dfc_lightning.operations.layout import SHARED, Layout


class Slot(int):
    """The place of a recorded tensor among the values of a pass."""


Deviations = list["Tensor | None"]
"""By slot; None where the control changes nothing. Of numbers that are no floats, the new value."""


@dataclass
class Frame:
    """The values of one pass over B samples, by slot, and what is derived from them.

    Args:
        values: the value of each slot that the program uses, else None.
        batch: B.
        dtype: of the values.
        layouts: where the samples lie in each.
        reach: β⁻ and β⁺ of finite differences, by which errors cross nonlinearities; None for derivatives.
        fed: the feedforward values, of a controlled state; None if these are they.
    """

    values: list[Tensor | None]
    batch: int
    dtype: torch.dtype
    layouts: Sequence[Layout]
    derived: dict[Any, Any] = field(default_factory=dict)
    reach: tuple[float, float] | None = None
    fed: Frame | None = None

    def __getitem__(self, slot: int) -> Tensor:
        value = self.values[slot]
        assert value is not None
        return value

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` returns, made at the first call for ``key``."""
        if key not in self.derived:
            self.derived[key] = make()
        return self.derived[key]

    def moved_by(self, moved: Deviations) -> Frame:
        """The values of the controlled state."""

        def value(before: Tensor | None, change: Tensor | None) -> Tensor | None:
            if before is None or change is None:
                return before
            return before + change if before.is_floating_point() else change

        values = [value(v, d) for v, d in zip(self.values, moved)]
        return Frame(values, self.batch, self.dtype, self.layouts, fed=self)

    def first(self, slot: int) -> Tensor:
        """A value with the samples in its first dimension."""
        return self.layouts[slot].first(self[slot])


class Operation:
    """A recorded call, to be made again with other tensors.

    Args:
        function: what was called.
        args: its positional arguments, recorded tensors replaced by their slots.
        kwargs: its keyword arguments, likewise.
        inputs: the slots in these.
        outputs: slots of the tensors it returned.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        inputs: list[Slot],
        outputs: list[Slot],
    ) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs
        self.inputs, self.outputs = inputs, outputs

    @property
    def name(self) -> str:
        """The name of what was called."""
        return getattr(self.function, "__name__", str(self.function))

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The arguments by their names."""
        return named(self.function, self.args, self.kwargs)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those among its arguments."""
        return [t for t in tensors_of([self.args, self.kwargs]) if isinstance(t, nn.Parameter)]

    def values(self, frame: Frame) -> Sequence[Tensor]:
        """The operation at a frame's values."""
        return self.at(lambda slot: frame[slot], frame.dtype)

    def deviations(self, frame: Frame, moved: Deviations) -> Sequence[Tensor | None]:
        """The change of its results, one an output, when its inputs change by ``moved``."""
        wide = {s: constant(frame[s], torch.float64) for s in self.inputs}
        before = frame.once(self, lambda: self.at(wide.__getitem__, torch.float64))
        for slot in self.inputs:
            if (change := moved[slot]) is not None:
                wide[slot] = wide[slot] + change.double() if wide[slot].is_floating_point() else change
        after = self.at(wide.__getitem__, torch.float64)
        return [
            (a - b).to(frame[slot].dtype) if a.is_floating_point() else a
            for a, b, slot in zip(after, before, self.outputs)
        ]

    def tangents(self, frame: Frame, moved: Deviations) -> Sequence[Tensor | None]:
        """The same to first order."""
        floats, kept = self._smooth(frame)
        found: list[Tensor | None] = [None] * len(self.outputs)
        if not floats or not kept:
            return found

        def run(*values: Tensor) -> tuple[Tensor, ...]:
            given = {s: frame[s] for s in self.inputs} | dict(zip(floats, values))
            results = self.at(given.__getitem__, frame.dtype)
            return tuple(results[k] for k in kept)

        changes = [torch.zeros_like(frame[s]) if (d := moved[s]) is None else d.contiguous() for s in floats]
        with sdpa_kernel(SDPBackend.MATH):  # attention's faster kernels know no tangents
            tangents = torch.func.jvp(run, tuple(frame[s].contiguous() for s in floats), tuple(changes))[1]
        for k, change in zip(kept, tangents):
            found[k] = change
        return found

    def pulled(self, frame: Frame, errors: Sequence[Tensor | None], live: bool = False) -> Sequence[Tensor | None]:
        """Errors of its inputs for those of its results: the transpose of :meth:`tangents`.

        Errors may be several times the batch, R B for B samples, R errors of every sample one after the other.

        Args:
            frame: the values at which to linearise.
            errors: one an output; None for none.
            live: let batch statistics follow their batch.
        """
        floats, kept = self._smooth(frame)
        reached = [k for k in kept if errors[k] is not None]
        found: list[Tensor | None] = [None] * len(self.inputs)
        if not floats or not reached:
            return found

        def linearise() -> tuple[list[Tensor], Sequence[Tensor]]:
            with torch.enable_grad():
                leaves = {s: frame[s].detach().requires_grad_() for s in floats}
                given = {s: frame[s] for s in self.inputs} | leaves
                return list(leaves.values()), self.at(given.__getitem__, frame.dtype)

        leaves, results = frame.once((self, "graph"), linearise)
        ends = [k for k in reached if results[k].requires_grad]
        if not ends:
            return found
        several = zip(
            *(
                frame.layouts[self.outputs[k]].split(error, frame.batch)
                for k in ends
                if (error := errors[k]) is not None
            )
        )
        back = [
            torch.autograd.grad([results[k] for k in ends], leaves, each, retain_graph=True, allow_unused=True)
            for each in several
        ]
        for slot, parts in zip(floats, zip(*back)):
            found[self.inputs.index(slot)] = None if parts[0] is None else frame.layouts[slot].joined(parts)
        return found

    def _smooth(self, frame: Frame) -> tuple[list[Slot], list[int]]:
        """The inputs and the numbers of the results that are floats."""
        floats = [s for s in self.inputs if frame[s].is_floating_point() and frame.layouts[s] != SHARED]
        return floats, [k for k, s in enumerate(self.outputs) if frame[s].is_floating_point()]

    def at(
        self, value: Callable[[Slot], Tensor], dtype: torch.dtype, instead: Mapping[int, Tensor] | None = None
    ) -> Sequence[Tensor]:
        """The operation with other values in its slots, and with others, by id, ``instead`` of constants."""
        args, kwargs = filled((self.args, self.kwargs), value, dtype, instead=instead)
        if writes_into_argument(self.function, args, kwargs):
            if args:
                args = [args[0].clone(), *args[1:]]
            else:
                kwargs = {**kwargs, "input": kwargs["input"].clone()}
        return tensors_of(self.function(*args, **kwargs))


def slots_in(tree: Any) -> list[Slot]:
    """The slots among arguments, each once."""
    found: list[Slot] = []
    waiting = [tree]
    while waiting:
        each = waiting.pop()
        if isinstance(each, Slot):
            found.append(each)
        elif type(each) in (tuple, list):
            waiting.extend(reversed(each))
        elif type(each) is dict:
            waiting.extend(reversed(each.values()))
    return list(dict.fromkeys(found))


def filled(
    tree: Any,
    value: Callable[[Slot], Tensor],
    dtype: torch.dtype,
    still: bool = False,
    instead: Mapping[int, Tensor] | None = None,
) -> Any:
    """Arguments with tensors in their slots; ``still`` puts zeros for other numbers, which do not move."""
    if isinstance(tree, Slot):
        return value(tree)
    if isinstance(tree, Tensor):
        if instead is not None and id(tree) in instead:
            return instead[id(tree)]
        fixed = constant(tree, dtype)
        return torch.zeros_like(fixed) if still and fixed.is_floating_point() else fixed
    if isinstance(tree, dict):
        return {k: filled(v, value, dtype, still, instead) for k, v in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)(filled(v, value, dtype, still, instead) for v in tree)
    return tree


def constant(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor that no sample moves, such as a weight, as the dtype of the pass has it."""
    return value.detach().to(dtype) if value.is_floating_point() else value
