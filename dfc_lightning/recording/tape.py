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
from dfc_lightning.operations.recognise import DROPOUT, Call, dropped, operation, refuse_unrepeatable
from dfc_lightning.operations.surrogate import surrogate
from dfc_lightning.recording.beside import refuse_unseen
from dfc_lightning.recording.own_backward import FunctionCall

AtCall = Callable[[Callable[..., Any], Sequence[Any], dict[str, Any], Any], Any]


def _tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def with_item(value: Tensor, index: Any, item: Any) -> Tensor:
    """``value`` with some entries written."""
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
        at_call: given each recorded call and its result; what it returns takes the result's place.
        fixed: tensors that have no row a sample, whatever their shape.
    """

    def __init__(
        self,
        layers: int,
        at_output: Callable[[Tensor], Tensor],
        at_call: AtCall,
        fixed: Iterable[Tensor] = (),
    ) -> None:
        super().__init__()
        self._at_call = at_call
        self.masks: list[Slot] = []
        """Of dropout, in order."""
        self._fixed = {id(tensor) for tensor in fixed}
        self.operations: list[Operation] = []
        self.output: Slot | None = None
        self._all, self._at_output = (1 << layers) - 1, at_output
        self._values: list[Tensor] = []
        self._passed: list[int] = []
        self._slot: dict[int, Slot] = {}
        self._alive: list[Tensor] = []  # what has a slot must keep its id
        self._stale: dict[int, str] = {}  # what has overwritten it
        self._own: dict[int, tuple[FunctionCall, Operation, dict[int, Slot]]] = {}  # by node
        self._paused = False
        self._calling = ""
        self._with_grad = torch.is_grad_enabled()
        self._recorders: dict[str, Callable[..., Any]] = {
            "__setitem__": self._set_item,
            **dict.fromkeys(DROPOUT, self._dropout),
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
        refuse_unrepeatable(func, args, kwargs)
        self._calling = name
        result = self._recorders.get(name, self._call)(func, args, kwargs)
        return self.look(self._at_call(func, args, kwargs, result))

    @property
    def beside(self) -> bool:
        """Whether gradients are off that were on: what is computed now is constant to the rest, as autograd has it."""
        return torch.is_grad_enabled() != self._with_grad

    # What is recorded how

    def _call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        slots = self.with_slots(args), self.with_slots(kwargs)
        overwrites = writes_into_argument(func, args, kwargs)
        if overwrites:
            self._keep(args[0] if args else kwargs["input"])
        result = func(*args, **kwargs)
        self._record(func, *slots, result, overwrites)
        return result

    def _set_item(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        _, *rest = self.with_slots(args)
        self._keep(args[0])
        target = self.enter(args[0])
        func(*args, **kwargs)
        self._record(with_item, (target, *rest), {}, args[0], True)

    def _dropout(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        x = dropped(func, args, kwargs)
        if x is None:
            return named(func, args, kwargs)["input"]  # type: ignore[no-any-return]
        with self.paused():
            ones = torch.ones_like(x)
            mask = func(ones, *args[1:], **kwargs) if args else func(**{**kwargs, "input": ones})
            source, kept = self.enter(x), self._new(mask, 0)
            result = x * mask
            if writes_into_argument(func, args, kwargs):
                self._keep(x)
                result = x.copy_(result)
            target = self._new(result, self._passed[source])
            self.masks.append(kept)
        self.operations.append(Product(torch.mul, [source, kept], {}, [source, kept], [target]))
        return result

    def note(self, call: FunctionCall) -> None:
        """Keep a call of an autograd function, to be recorded when a result of it is used that has its history."""
        if self.output is not None or self._paused:
            return
        with self.paused():
            made = {k: t for k, t in enumerate(_tuple(call.result)) if isinstance(t, Tensor)}
            if not self._concerned(call.args, {}) or len(made) != len(tensors_of(call.result)):
                return
            if getattr(call.node, "dirty_tensors", None):
                raise ControlError(
                    f"The function {call.function.__name__} overwrites its argument, and would do so again and again "
                    "while the network settles. Let its forward return a new tensor, without mark_dirty()."
                )
            args = self.with_slots(call.args)
            inputs, passed = slots_in(args), 0
            for slot in inputs:
                passed |= self._passed[slot]
            outputs = {k: self._nameless(t, passed) for k, t in made.items()}
            self.operations.append(Operation(call.function.apply, args, {}, inputs, list(outputs.values())))
            self._own[id(call.node)] = call, self.operations[-1], outputs

    def _resolve(self, tensor: Tensor) -> Slot | None:
        """The slot of a tensor, which an autograd function may just have returned."""
        slot = self._slot.get(id(tensor))
        if slot is not None or not self._own:
            return slot
        call, noted, outputs = self._own.get(id(tensor.grad_fn), (None, None, {}))
        if call is None or noted is None:
            return None
        if noted in self.operations:
            parts = noted.function, noted.args, noted.kwargs, noted.inputs, noted.outputs
            with self.paused():
                known = surrogate(call.function.__name__, parts, self._values)
            self.operations[self.operations.index(noted)] = known
        slot = outputs[tensor.output_nr]
        self._slot[id(tensor)] = slot
        self._alive[slot] = tensor
        return slot

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
            slot = self._resolve(tensor)
            if slot is None:
                refuse_unseen(tensor)
                slot = self._new(tensor, 0)
            return slot

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

    def wire(self, arriving: Tensor, handed: Tensor) -> Slot:
        """Let ``handed`` stand for ``arriving``; the slot of it."""
        with self.paused():
            source = self.enter(arriving)
            target = self._new(handed, self._passed[source])
        self.operations.append(Same(hand_on, [source], {}, [source], [target]))
        return target

    def slot(self, tensor: Tensor) -> Slot | None:
        """The slot of a tensor; None if it has none."""
        return self._slot.get(id(tensor))

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

    def move_behind(self, passage: Passage, norm: Operation) -> Passage:
        """Let a point lie behind the operation that alone hears it; what has heard that now hears the point."""
        self.dissolve(passage)
        handed = norm.outputs[0]
        arriving = Slot(len(self._values))
        self._values.append(self._values[handed])
        self._passed.append(self._passed[handed])
        self._alive.append(self._alive[handed])
        norm.outputs = [arriving]
        found = Passage(arriving, handed)
        self.operations.insert(self.operations.index(norm) + 1, found)
        return found

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
        assert self.output is not None
        return Frame(values, self._values[0].shape[0], self._values[self.output].dtype)

    def reaches_end(self, layer: int) -> bool:
        """Whether the last recorded tensor depends on the layer of this bit."""
        return bool(self._passed and self._passed[-1] & layer)

    def close(self) -> None:
        """Let go of all tensors: hooks and tape refer to each other, and would keep them until they are collected."""
        self.operations, self._values, self._alive, self._slot, self._recorders = [], [], [], {}, {}
        self._at_output, self._at_call = lambda output: output, lambda func, args, kwargs, result: result
        self._own = {}

    # Slots

    def _concerned(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        return any(self._resolve(t) is not None for t in tensors_of([*args, *kwargs.values()]))

    def with_slots(self, tree: Any) -> Any:
        """Arguments, those tensors that have slots, or a row a sample, replaced by their slots."""
        if isinstance(tree, Tensor):
            if id(tree) in self._stale:
                raise ControlError(
                    f"A tensor is used after the operation {self._stale[id(tree)]} has overwritten a view of it, or "
                    "what it is a view of, in place. While the network settles that cannot be followed; use the "
                    "operation that is not in place."
                )
            slot = self._resolve(tree)
            if slot is None:
                refuse_unseen(tree)
                slot = self._new(tree, 0) if self._is_of_samples(tree) else None
            return tree if slot is None else slot
        if isinstance(tree, dict):
            return {k: self.with_slots(v) for k, v in tree.items()}
        if type(tree) in (tuple, list):
            return type(tree)(self.with_slots(v) for v in tree)
        return tree

    def _is_of_samples(self, tensor: Tensor) -> bool:
        """Whether a tensor from outside has a row a sample; that it was right to think so is checked afterwards."""
        batch = self._values[0].shape[0]
        fixed = isinstance(tensor, nn.Parameter) or id(tensor) in self._fixed
        return not fixed and tensor.dim() > 1 and tensor.shape[0] == batch

    def _new(self, tensor: Tensor, passed: int) -> Slot:
        slot = self._nameless(tensor, passed)
        self._slot[id(tensor)] = slot
        return slot

    def _nameless(self, tensor: Tensor, passed: int) -> Slot:
        slot = Slot(len(self._values))
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
