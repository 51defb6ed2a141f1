"""The operations of one forward pass, recorded so that they can be made again under control."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dfc_lightning.control.checks import ControlError
from dfc_lightning.control.operations import (
    Frame,
    Operation,
    Product,
    Same,
    Slot,
    slots_in,
    tensors_of,
    writes_into_argument,
)
from dfc_lightning.control.recognise import draws_random_numbers, operation


class Passage(Operation):
    """A control point: what arrives there is handed on, driven by the apical compartment.

    Args:
        source: slot of what arrives, the basal voltage.
        target: slot of what is handed on, the somatic voltage.
    """

    index: int
    """Number of the point, in the order of the pass."""

    def __init__(self, source: Slot, target: Slot) -> None:
        super().__init__(_hand_on, [source], {}, [source], [target])
        self.source, self.target = source, target


def _hand_on(value: Tensor) -> Tensor:
    return value


def _with_item(value: Tensor, index: Any, item: Any) -> Tensor:
    value = value.clone()
    value[index] = item
    return value


def _moves_statistics(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    named = dict(zip(("input", "running_mean", "running_var", "weight", "bias", "use_input_stats"), args)) | kwargs
    return named.get("running_mean") is not None and named.get("use_input_stats", True)


class Tape(TorchFunctionMode):
    """Records what becomes of the layers' inputs while it is entered.

    Every tensor that comes of a layer's input has a slot and a mask of the layers it has passed. The network's output
    is the first matrix, (B, n_L), that has passed them all.

    Args:
        layers: how many layers there are.
        at_output: called with the output; what it returns takes the output's place.
        fixed: tensors that have no row a sample, whatever their shape.
    """

    def __init__(self, layers: int, at_output: Callable[[Tensor], Tensor], fixed: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._fixed = {id(tensor) for tensor in fixed}
        self.operations: list[Operation] = []
        self.output: Slot | None = None
        self._all, self._at_output = (1 << layers) - 1, at_output
        self._values: list[Tensor] = []
        self._passed: list[int] = []
        self._slot: dict[int, Slot] = {}
        self._alive: list[Tensor] = []  # what has a slot must keep its id
        self._stale: set[int] = set()
        self._paused = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self._paused or not self._concerned(args, kwargs) or name.endswith("_like") or name.startswith("new_"):
            return func(*args, **kwargs)
        if self.output is not None:
            return self._beside(name, func(*args, **kwargs), args, kwargs)
        if name.startswith("dropout") or name == "feature_dropout":
            return self._dropout(func, args, kwargs)
        if draws_random_numbers(name, args, kwargs):
            raise ControlError(
                f"The network draws random numbers in {name}, which cannot be drawn alike while it settles. Use "
                "nn.Dropout, whose masks are kept, or take it out."
            )
        slots = self._with_slots(args), self._with_slots(kwargs)
        overwrites = writes_into_argument(func, args, kwargs)
        if kwargs.get("out") is not None or (name == "instance_norm" and _moves_statistics(args, kwargs)):
            raise ControlError(
                f"The call of {name} writes into a tensor from outside, and would do so again and again while the "
                "network settles. Leave out=… away, and track_running_stats."
            )
        if name == "__setitem__":
            self._keep(args[0])
            target = self.enter(args[0])
            func(*args, **kwargs)
            self._record(_with_item, (target, *slots[0][1:]), {}, args[0], True)
            return None
        if overwrites:
            self._keep(args[0] if args else kwargs["input"])
        result = func(*args, **kwargs)
        self._record(func, slots[0], slots[1], result, overwrites)
        return self.look(result)

    def _beside(self, name: str, result: Any, args: Any, kwargs: Any) -> Any:
        """Complain of what hidden layers send past the output: no error would come back that way."""
        if torch.is_grad_enabled() and name != "detach" and any(t.is_floating_point() for t in tensors_of(result)):
            for tensor in tensors_of([*args, *kwargs.values()]):
                slot = self._slot.get(id(tensor))
                if slot is not None and slot != self.output and self._passed[slot]:
                    raise ControlError(
                        f"What a hidden layer has computed is used in {name} beside the network's output, which all "
                        "layers have been passed for. Feedback control takes the loss of that output alone: let the "
                        "last layer come last, and detach() what is only to be looked at."
                    )
        return result

    def enter(self, tensor: Tensor) -> Slot:
        """The slot of a tensor, a new one if it comes from outside."""
        paused, self._paused = self._paused, True
        slot = self._slot.get(id(tensor))
        slot = self._new(tensor, 0) if slot is None else slot
        self._paused = paused
        return slot

    def passage(self, arriving: Tensor, layers: int) -> tuple[Tensor, Passage]:
        """Let ``arriving`` pass a control point.

        Args:
            arriving: the voltage.
            layers: bits of the layers that have made it.

        Returns:
            What is handed on, detached, and the record of it.
        """
        self._paused = True
        source = self.enter(arriving)
        handed = arriving.detach()
        target = self._new(handed, self._passed[source] | layers)
        found = Passage(source, target)
        self.operations.append(found)
        self._paused = False
        return handed, found

    def maker(self, slot: Slot) -> Operation:
        """The operation that gives a slot its tensor."""
        return next(each for each in self.operations if slot in each.outputs)

    def dissolve(self, passage: Passage) -> None:
        """Make a passage a mere wire: the point lies further on."""
        place = self.operations.index(passage)
        self.operations[place] = Same(_hand_on, [passage.source], {}, [passage.source], [passage.target])

    def program(self) -> list[Operation]:
        """The operations that lead to the output, in order."""
        assert self.output is not None
        wanted, found = {int(self.output)}, []
        for each in reversed(self.operations):
            if wanted.intersection(each.outputs):
                found.append(each)
                wanted.update(each.inputs)
        return found[::-1]

    def frame(self) -> Frame:
        """The recorded values."""
        return Frame(list(self._values), self._values[0].shape[0], self._values[0].dtype)

    def close(self) -> None:
        """Let go of all tensors: hooks and tape refer to each other, and would keep them until they are collected."""
        self.operations, self._values, self._alive, self._slot = [], [], [], {}
        self._at_output = lambda output: output

    def reaches_end(self, layer: int) -> bool:
        """Whether the last recorded tensor depends on the layer of this bit."""
        return bool(self._passed and self._passed[-1] & layer)

    def _keep(self, tensor: Tensor) -> None:
        """Copy what is about to be overwritten: this tensor, and what else lies in its memory."""
        storage = tensor.untyped_storage().data_ptr()
        for slot, (value, owner) in enumerate(zip(self._values, self._alive)):
            if value.untyped_storage().data_ptr() == storage:
                self._values[slot] = value.clone()
                if owner is not tensor:
                    self._stale.add(id(owner))  # a view, or what this is one of: it changes with it, unseen

    def _concerned(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        return any(id(t) in self._slot for t in tensors_of([*args, *kwargs.values()]))

    def _with_slots(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            if id(tree) in self._stale:
                raise ControlError(
                    "A tensor is used after a view of it, or what it is a view of, was overwritten in place. While the "
                    "network settles that cannot be followed; use the operation that is not in place."
                )
            slot = self._slot.get(id(tree))
            if slot is None and self._is_of_samples(tree):
                slot = self._new(tree, 0)
            return tree if slot is None else slot
        if isinstance(tree, dict):
            return {k: self._with_slots(v) for k, v in tree.items()}
        if type(tree) in (tuple, list):
            return type(tree)(self._with_slots(v) for v in tree)
        return tree

    def _is_of_samples(self, tensor: Tensor) -> bool:
        """Whether a tensor from outside has a row a sample; that it was right to think so is checked by the graph."""
        batch = self._values[0].shape[0]
        fixed = isinstance(tensor, nn.Parameter) or id(tensor) in self._fixed
        return not fixed and tensor.dim() > 1 and tensor.shape[0] == batch

    def _new(self, tensor: Tensor, passed: int) -> Slot:
        slot = Slot(len(self._values))
        self._slot[id(tensor)] = slot
        self._alive.append(tensor)
        self._values.append(tensor.detach())
        self._passed.append(passed)
        return slot

    def _record(self, func: Callable[..., Any], args: Any, kwargs: Any, result: Any, overwrites: bool) -> None:
        made = tensors_of(result)
        if not made or (not overwrites and all(id(t) in self._slot for t in made)):
            return  # nothing to follow, or what was there before
        inputs, passed = slots_in((args, kwargs)), 0
        for slot in inputs:
            passed |= self._passed[slot]
        if passed and any(t.is_complex() for t in made):
            raise ControlError(
                f"The network computes with complex numbers in {getattr(func, '__name__', func)}, which feedback "
                "control cannot follow. Write it with real ones, or freeze the layers before it with "
                "requires_grad_(False)."
            )
        outputs = [self._new(t, passed) for t in made]
        self.operations.append(operation(func, args, kwargs, inputs, outputs, self._values))

    def _dropout(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        named = dict(zip(("input", "p", "training", "inplace"), args)) | kwargs
        x = named["input"]
        self._paused = True
        ones = torch.ones_like(x)
        mask = func(ones, *args[1:], **kwargs) if args else func(**{**kwargs, "input": ones})
        source, kept = self.enter(x), self._new(mask, 0)
        result = x * mask
        if named.get("inplace") or getattr(func, "__name__", "").endswith("_"):
            self._keep(x)
            result = x.copy_(result)
        target = self._new(result, self._passed[source])
        self.operations.append(Product(torch.mul, [source, kept], {}, [source, kept], [target]))
        self._paused = False
        return self.look(result)

    def look(self, result: Any) -> Any:
        """Notice the network's output."""
        if isinstance(result, Tensor) and result.dim() == 2 and self.output is None:
            slot = self._slot.get(id(result))
            if slot is not None and self._passed[slot] == self._all:
                self.output = slot
                return self._at_output(result)
        return result
