"""The operations of one forward pass, recorded so that they can be made again under control."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dfc_lightning.errors import ControlError
from dfc_lightning.operations.arguments import named, tensors_of, writes_into_argument
from dfc_lightning.operations.linear import Product, Same
from dfc_lightning.operations.operation import Frame, Operation, Slot, slots_in
from dfc_lightning.operations.passage import Passage, hand_on
from dfc_lightning.operations.recognise import Call, draws_random_numbers, moves_statistics, operation
from dfc_lightning.recording.unseen import refuse_unseen


def _with_item(value: Tensor, index: Any, item: Any) -> Tensor:
    value = value.clone()
    value[index] = item
    return value


class Tape(TorchFunctionMode):
    """Records what becomes of the layers' inputs while it is entered, up to the network's output.

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
        self._stale: dict[int, str] = {}  # what has overwritten it
        self._paused = False
        self._calling = ""
        self._with_grad = torch.is_grad_enabled()
        self._recorders: dict[str, Callable[..., Any]] = {
            "__setitem__": self._set_item,
            **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d"), self._dropout),
            **dict.fromkeys(("dropout_", "feature_dropout", "feature_dropout_"), self._dropout),
        }

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.output is not None or self._paused or torch.is_grad_enabled() != self._with_grad:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name.endswith("_like") or name.startswith("new_") or not self._concerned(args, kwargs):
            return func(*args, **kwargs)
        _refuse(func, args, kwargs)
        self._calling = name
        return self.look(self._recorders.get(name, self._call)(func, args, kwargs))

    @property
    def beside(self) -> bool:
        """Whether gradients are off that were on: what is computed now is constant to the rest, as autograd has it."""
        return torch.is_grad_enabled() != self._with_grad

    # What is recorded how

    def _call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        slots = self._with_slots(args), self._with_slots(kwargs)
        overwrites = writes_into_argument(func, args, kwargs)
        if overwrites:
            self._keep(args[0] if args else kwargs["input"])
        result = func(*args, **kwargs)
        self._record(func, *slots, result, overwrites)
        return result

    def _set_item(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        _, *rest = self._with_slots(args)
        self._keep(args[0])
        target = self.enter(args[0])
        func(*args, **kwargs)
        self._record(_with_item, (target, *rest), {}, args[0], True)

    def _dropout(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        given = named(func, args, kwargs)
        x = given["input"]
        if not given.get("training", given.get("train", True)):
            return x
        with self.paused():
            ones = torch.ones_like(x)
            mask = func(ones, *args[1:], **kwargs) if args else func(**{**kwargs, "input": ones})
            source, kept = self.enter(x), self._new(mask, 0)
            result = x * mask
            if writes_into_argument(func, args, kwargs):
                self._keep(x)
                result = x.copy_(result)
            target = self._new(result, self._passed[source])
        self.operations.append(Product(torch.mul, [source, kept], {}, [source, kept], [target]))
        return result

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing inside."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def enter(self, tensor: Tensor) -> Slot:
        """The slot of a tensor, a new one if it comes from outside."""
        with self.paused():
            slot = self._slot.get(id(tensor))
            if slot is None:
                refuse_unseen(tensor, "a layer")
            return self._new(tensor, 0) if slot is None else slot

    def passage(self, arriving: Tensor, handed: Tensor, layers: int) -> Passage:
        """Let ``arriving`` pass a control point.

        Args:
            arriving: the voltage.
            handed: what is handed on for it, without its history.
            layers: bits of the layers that have made it.
        """
        with self.paused():
            source = self.enter(arriving)
            found = Passage(source, self._new(handed, self._passed[source] | layers))
        self.operations.append(found)
        return found

    def look(self, result: Any) -> Any:
        """Notice the network's output."""
        if isinstance(result, Tensor) and result.dim() == 2 and self.output is None:
            slot = self._slot.get(id(result))
            if slot is not None and self._passed[slot] == self._all:
                self.output = slot
                return self._at_output(result)
        return result

    # What has been recorded

    def maker(self, slot: Slot) -> Operation:
        """The operation that gives a slot its tensor."""
        return next(each for each in self.operations if slot in each.outputs)

    def dissolve(self, passage: Passage) -> None:
        """Make a passage a mere wire: the point lies further on."""
        place = self.operations.index(passage)
        self.operations[place] = Same(hand_on, [passage.source], {}, [passage.source], [passage.target])

    def program(self) -> list[Operation]:
        """The operations that lead to the output, in order."""
        assert self.output is not None
        wanted, found = {int(self.output)}, []
        for each in reversed(self.operations):
            if wanted.intersection(each.outputs):
                found.append(each)
                wanted.update(each.inputs)
        return found[::-1]

    def frame(self, program: Sequence[Operation]) -> Frame:
        """The recorded values that a program uses."""
        used = {int(s) for each in program for s in (*each.inputs, *each.outputs)}
        values = [v if k in used else None for k, v in enumerate(self._values)]
        return Frame(values, self._values[0].shape[0], self._values[0].dtype)

    def reaches_end(self, layer: int) -> bool:
        """Whether the last recorded tensor depends on the layer of this bit."""
        return bool(self._passed and self._passed[-1] & layer)

    def close(self) -> None:
        """Let go of all tensors: hooks and tape refer to each other, and would keep them until they are collected."""
        self.operations, self._values, self._alive, self._slot, self._recorders = [], [], [], {}, {}
        self._at_output = lambda output: output

    # Slots

    def _concerned(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        return any(id(t) in self._slot for t in tensors_of([*args, *kwargs.values()]))

    def _with_slots(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            if id(tree) in self._stale:
                raise ControlError(
                    f"A tensor is used after the operation {self._stale[id(tree)]} has overwritten a view of it, or "
                    "what it is a view of, in place. While the network settles that cannot be followed; use the "
                    "operation that is not in place."
                )
            slot = self._slot.get(id(tree))
            if slot is None:
                refuse_unseen(tree, f"the operation {self._calling}")
            if slot is None and self._is_of_samples(tree):
                slot = self._new(tree, 0)
            return tree if slot is None else slot
        if isinstance(tree, dict):
            return {k: self._with_slots(v) for k, v in tree.items()}
        if type(tree) in (tuple, list):
            return type(tree)(self._with_slots(v) for v in tree)
        return tree

    def _is_of_samples(self, tensor: Tensor) -> bool:
        """Whether a tensor from outside has a row a sample; that it was right to think so is checked afterwards."""
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

    def _keep(self, tensor: Tensor) -> None:
        """Copy what is about to be overwritten: this tensor, and what else lies in its memory."""
        storage = tensor.untyped_storage().data_ptr()
        for slot, (value, owner) in enumerate(zip(self._values, self._alive)):
            if value.untyped_storage().data_ptr() == storage:
                self._values[slot] = value.clone()
                if owner is not tensor:
                    self._stale[id(owner)] = self._calling  # a view, or what this is one of: it changes with it, unseen

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
        self.operations.append(operation(Call(func, args, kwargs, inputs, outputs, self._values)))


def _refuse(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raise a :class:`ControlError` for a call that cannot be made again as it was."""
    name = getattr(func, "__name__", str(func))
    if draws_random_numbers(func, args, kwargs):
        raise ControlError(
            f"The network draws random numbers in {name}, which cannot be drawn alike while it settles. Use "
            "nn.Dropout, whose masks are kept, or take it out."
        )
    if kwargs.get("out") is not None or moves_statistics(func, args, kwargs):
        raise ControlError(
            f"The call of {name} writes into a tensor from outside, and would do so again and again while the "
            "network settles. Leave out=… away, and track_running_stats."
        )
