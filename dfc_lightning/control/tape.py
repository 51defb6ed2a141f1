"""The operations of one forward pass, recorded so that they can be made again under control."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from dfc_lightning.control.recognise import RANDOM, operation


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


class Tape(TorchFunctionMode):
    """Records what becomes of the layers' inputs while it is entered.

    Every tensor that comes of a layer's input has a slot and a mask of the layers it has passed. The network's output
    is the first matrix, (B, n_L), that has passed them all.

    Args:
        layers: how many layers there are.
        at_output: called with the output; what it returns takes the output's place.
    """

    def __init__(self, layers: int, at_output: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.output: Slot | None = None
        self._all, self._at_output = (1 << layers) - 1, at_output
        self._values: list[Tensor] = []
        self._passed: list[int] = []
        self._slot: dict[int, Slot] = {}
        self._alive: list[Tensor] = []  # what has a slot must keep its id
        self._paused = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._paused or self.output is not None or not self._concerned(args, kwargs):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name.endswith("_like") or name.startswith("new_"):
            return func(*args, **kwargs)
        if name.startswith("dropout") or name == "feature_dropout":
            return self._dropout(func, args, kwargs)
        if name in RANDOM and not (name == "scaled_dot_product_attention" and not kwargs.get("dropout_p")):
            raise ControlError(
                f"The network draws random numbers in {name}, which cannot be drawn alike while it settles. Use "
                "nn.Dropout, whose masks are kept, or take it out."
            )
        slots = self._with_slots(args), self._with_slots(kwargs)
        overwrites = writes_into_argument(func, args, kwargs)
        if overwrites and isinstance(slots[0][0], Slot):
            self._keep(args[0])
        result = func(*args, **kwargs)
        self._record(func, slots[0], slots[1], result, overwrites)
        return self.look(result)

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
        for slot, value in enumerate(self._values):
            if value.untyped_storage().data_ptr() == storage:
                self._values[slot] = value.clone()

    def _concerned(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        return any(id(t) in self._slot for t in tensors_of([*args, *kwargs.values()]))

    def _with_slots(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
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
        return not isinstance(tensor, nn.Parameter) and tensor.dim() > 1 and tensor.shape[0] == batch

    def _new(self, tensor: Tensor, passed: int) -> Slot:
        slot = Slot(len(self._values))
        self._slot[id(tensor)] = slot
        self._alive.append(tensor)
        self._values.append(tensor.detach())
        self._passed.append(passed)
        return slot

    def _record(self, func: Callable[..., Any], args: Any, kwargs: Any, result: Any, overwrites: bool) -> None:
        made = [t for t in tensors_of(result) if t.is_floating_point()]
        if not made or len(made) != len(tensors_of(result)):
            self._record_some(func, args, kwargs, result)
            return
        if not overwrites and all(id(t) in self._slot for t in made):
            return  # what was there before
        inputs, passed = slots_in((args, kwargs)), 0
        for slot in inputs:
            passed |= self._passed[slot]
        outputs = [self._new(t, passed) for t in made]
        self.operations.append(operation(func, args, kwargs, inputs, outputs, self._values))

    def _record_some(self, func: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
        """Of values and indices, as max-pooling may return, only the values pass deviations."""
        first = tensors_of(result)[:1]
        if first and first[0].is_floating_point():
            self._record(lambda *a, **k: func(*a, **k)[0], args, kwargs, first[0], False)

    def _dropout(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        named = dict(zip(("input", "p", "training", "inplace"), args)) | kwargs
        x = named["input"]
        self._paused = True
        mask = func(torch.ones_like(x), named.get("p", 0.5), named.get("training", True), False)
        source, kept = self.enter(x), self._new(mask, 0)
        result = x * mask
        if named.get("inplace"):
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
