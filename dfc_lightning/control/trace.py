"""Which elementwise function lies between two layers, found by watching one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dfc_lightning.control.checks import ControlError
from dfc_lightning.control.nonlinearity import (
    Elementwise,
    Identity,
    LeakyReLU,
    Nonlinearity,
    ReLU,
    Sigmoid,
    Tanh,
)

_TANH = (torch.tanh, F.tanh, Tensor.tanh)
_SIGMOID = (torch.sigmoid, F.sigmoid, Tensor.sigmoid)
_RELU = (torch.relu, F.relu, Tensor.relu, torch.relu_, Tensor.relu_)


class _Call(NamedTuple):
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        return [a for a in (*self.args, *self.kwargs.values()) if isinstance(a, Tensor)]


class OperationRecorder(TorchFunctionMode):
    """Records every torch operation that returns a tensor, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[_Call] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._calls.append(_Call(func, args, kwargs or {}, result))
        return result

    def path(self, source: Tensor, end: Tensor, before: Tensor, name: str) -> tuple[Nonlinearity, bool]:
        """The nonlinearity that made ``end`` of ``source``, and whether it overwrote its argument.

        Args:
            source: the voltage handed on by a layer, (B, n).
            end: the rates that the next layer received.
            before: a copy of ``source`` made before it was handed on.
            name: the layer, for error messages.

        Raises:
            ControlError: what lies between is not an elementwise function of ``source`` alone.
        """
        calls, others = self._between(source, end)
        if not calls and end is not source:
            raise ControlError(
                f"The layer after {name!r} does not receive what {name!r} computed. A controlled chain passes each "
                "layer's output through an elementwise nonlinearity to the next; control one such chain with "
                "network='<name of the submodule>', or freeze the other layers with requires_grad_(False)."
            )
        overwrites = any(call.args and call.result is call.args[0] for call in calls)
        found = _named(calls) or Elementwise(_replay(calls, source))
        if others or end.shape != before.shape or not _is_elementwise(found, before, end):
            raise ControlError(
                f"What follows the layer {name!r} is not an elementwise nonlinearity "
                f"({', '.join(_name(call) for call in calls)}). A controlled chain is made of Linear layers with "
                "elementwise functions between them; dropout, normalisation, pooling and sums of branches are "
                "not among these. Take it out, or freeze the layers before it with requires_grad_(False)."
            )
        return found, overwrites

    def _between(self, source: Tensor, end: Tensor) -> tuple[list[_Call], bool]:
        """The calls that lead from ``source`` to ``end``, and whether other tensors flow in on the way."""
        birth = max(
            (k for k, c in enumerate(self._calls) if c.result is source and all(a is not source for a in c.tensors)),
            default=-1,
        )
        wanted, found = {id(end)}, []
        for call in reversed(self._calls[birth + 1 :]):
            if id(call.result) in wanted:
                found.append(call)
                wanted |= {id(a) for a in call.tensors}
        if id(source) not in wanted:
            return [], True
        known = {id(source)} | {id(call.result) for call in found}
        others = any(id(a) not in known and a.numel() > 1 for call in found for a in call.tensors)
        return found[::-1], others


def _name(call: _Call) -> str:
    return getattr(call.function, "__name__", str(call.function))


def _named(calls: Sequence[_Call]) -> Nonlinearity | None:
    """The nonlinearity, if it is one with a closed form of its own."""
    if not calls:
        return Identity()
    call = calls[0]
    if len(calls) > 1:
        return None
    if call.function in _TANH:
        return Tanh()
    if call.function in _SIGMOID:
        return Sigmoid()
    if call.function in _RELU:
        return ReLU
    if call.function is F.leaky_relu:
        slope = call.args[1] if len(call.args) > 1 else call.kwargs.get("negative_slope", 0.01)
        return LeakyReLU(float(slope))
    return None


class _Slot(int):
    """The place of an intermediate value in a replayed program."""


def _replay(calls: Sequence[_Call], source: Tensor) -> Callable[[Tensor], Tensor]:
    """The recorded operations as a function of what stood in the place of ``source``."""
    slots = {id(source): _Slot(0)}
    program: list[tuple[Callable[..., Any], list[Any], dict[str, Any]]] = []
    for k, call in enumerate(calls, start=1):
        args = [slots.get(id(a), a) if isinstance(a, Tensor) else a for a in call.args]
        kwargs = {n: slots.get(id(a), a) if isinstance(a, Tensor) else a for n, a in call.kwargs.items()}
        program.append((call.function, args, kwargs))
        slots[id(call.result)] = _Slot(k)

    def run(v: Tensor) -> Tensor:
        values = [v.clone()]
        for function, args, kwargs in program:
            filled = [values[a] if isinstance(a, _Slot) else a for a in args]
            named = {n: values[a] if isinstance(a, _Slot) else a for n, a in kwargs.items()}
            values.append(function(*filled, **named))
        return values[-1]

    return run


def _is_elementwise(phi: Nonlinearity, v: Tensor, r: Tensor) -> bool:
    """φ(v) is r, and an entry of φ(v) depends on nothing but its own entry of v."""
    with torch.no_grad():
        rtol, atol = (2e-2, 2e-2) if v.dtype.itemsize < 4 else (1e-4, 1e-6)
        if not torch.allclose(phi(v), r.to(v.dtype), rtol, atol, equal_nan=True):
            return False
        if not isinstance(phi, Elementwise):
            return True
        for dim, size in enumerate(v.shape):
            place = torch.arange(size, device=v.device).unsqueeze(1 - dim).expand_as(v)
            for bit in range((size - 1).bit_length()):  # two different places differ in one of these
                for keep in (half := (place >> bit) % 2 == 0, ~half):
                    if not torch.allclose(
                        phi(torch.where(keep, v, 0.3 - v))[keep], r.to(v.dtype)[keep], rtol, atol, equal_nan=True
                    ):
                        return False
    return True
