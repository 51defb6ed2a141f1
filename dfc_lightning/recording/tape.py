"""The operations of one forward pass, recorded so that they can be made again under control."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dfc_lightning.errors import ControlError
from dfc_lightning.operations.arguments import named, tensors_of, writes_into_argument
from dfc_lightning.operations.laying import laid
from dfc_lightning.operations.layout import FIRST, SHARED, Layout
from dfc_lightning.operations.linear import Expand, Product, Same
from dfc_lightning.operations.meeting import beside
from dfc_lightning.operations.operation import Operation, Slot, slots_in
from dfc_lightning.operations.passage import Passage, hand_on
from dfc_lightning.operations.recognise import DROPOUT, Call, dropped, operation, refuse_unrepeatable
from dfc_lightning.operations.surrogate import surrogate
from dfc_lightning.recording.beside import refuse_unseen
from dfc_lightning.recording.learning import Learning
from dfc_lightning.recording.opened import opened
from dfc_lightning.recording.outside import Outside
from dfc_lightning.recording.own_backward import FunctionCall
from dfc_lightning.recording.slots import Slots

AtCall = Callable[[Operation, Any], Any]


_LOSSES = {"cross_entropy", "nll_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits", "mse_loss"}
_LOSSES |= {"l1_loss", "smooth_l1_loss", "huber_loss", "kl_div", "poisson_nll_loss", "gaussian_nll_loss", "ctc_loss"}
_SPREADING = ("expand", "expand_as", "broadcast_to", "repeat", "tile", "repeat_interleave")
_LIKE = ("to", "type_as", "expand_as", "view_as", "reshape_as")
"""Calls that look no more than at the type or shape of their second argument."""


def _tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def with_item(value: Tensor, index: Any, item: Any) -> Tensor:
    """``value`` with some entries written."""
    value = value.clone()
    value[index] = item
    return value


class Tape(Slots, TorchFunctionMode):
    """Records what becomes of what is given to calls with parameters, while it is entered, up to the network's output.

    Every tensor that comes of a parameter, or of samples that have met one, has a slot and a mask of the parameters
    that it depends on. The network's output is the first matrix, (B, n_L), that depends on them all.

    Args:
        learning: the parameters that are to be taught.
        at_output: called with the output; what it returns takes the output's place.
        at_call: given each recorded call and its result; what it returns takes the result's place.
        fixed: tensors that are the same for all samples, whatever their shape.
        as_returned: let the output be what :meth:`reach` is given, not the first matrix.
    """

    def __init__(
        self,
        learning: Learning,
        at_output: Callable[[Tensor], Tensor],
        at_call: AtCall,
        fixed: Iterable[Tensor] = (),
        as_returned: bool = False,
    ) -> None:
        super().__init__()
        self.as_returned = as_returned
        self._at_call, self._learning = at_call, learning
        self.masks: list[Slot] = []
        """Of dropout, in order."""
        self._fixed = {id(tensor): tensor for tensor in fixed}  # alive: one that is replaced must keep its id
        self._at_output = at_output
        self._outside = Outside()
        self._stale: dict[int, str] = {}  # what has overwritten it
        self._own: dict[int, tuple[FunctionCall, Operation, dict[int, Slot]]] = {}  # by node
        self._paused = False
        self._calling = ""
        self._last: Operation | None = None
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
        if name in _LOSSES and (args or "input" in kwargs):
            first = args[0] if args else kwargs["input"]
            with self:
                reached = self.reach([first])
            if reached is not None:
                args, kwargs = ((*reached, *args[1:]), kwargs) if args else (args, {**kwargs, "input": reached[0]})
                return func(*args, **kwargs)
        if name.endswith("_like") or name.startswith("new_"):
            return func(*args, **kwargs)
        given = tensors_of([*args, *kwargs.values()])
        if not self._concerned(tensors_of(args[:1]) if name in _LIKE else given):
            result = func(*args, **kwargs)
            if len(self._outside):
                self._outside.follow(func, args, kwargs, result)
            return result
        if self._learning.leaves(given):
            return func(*args, **kwargs)
        written_out = opened(func, args, kwargs, lambda: any(each in self._learning for each in given))
        if written_out is not None:
            with self:
                return written_out()
        self._calling, self._last = name, None
        result = self._recorders.get(name, self._call)(func, args, kwargs)
        return self.look(result if self._last is None else self._at_call(self._last, result))

    @property
    def beside(self) -> bool:
        """Whether gradients are off that were on: what is computed now is constant to the rest, as autograd has it."""
        return torch.is_grad_enabled() != self._with_grad

    # What is recorded how

    def _call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        slots = self._slotted(func, args, kwargs)
        if any(self.layouts[s] != SHARED for s in slots_in(slots)):
            refuse_unrepeatable(func, args, kwargs)
        overwrites = writes_into_argument(func, args, kwargs)
        if overwrites:
            self._keep(args[0] if args else kwargs["input"])
        result = func(*args, **kwargs)
        self._record(func, *slots, result, overwrites)
        return result

    def _set_item(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        (_, *rest), _ = self._slotted(func, args, kwargs)
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
            source = self.enter(x)
            layout = self.layouts[source]
            kept = self.new(mask, 0, layout)
            result = x * mask
            if writes_into_argument(func, args, kwargs):
                self._keep(x)
                result = x.copy_(result)
            target = self.new(result, self.passed[source], layout)
            self.masks.append(kept)
        self.operations.append(Product(torch.mul, [source, kept], {}, [source, kept], [target]))
        return result

    def note(self, call: FunctionCall) -> None:
        """Keep a call of an autograd function, to be recorded when a result of it is used that has its history."""
        if self.output is not None or self._paused:
            return
        with self.paused():
            made = {k: t for k, t in enumerate(_tuple(call.result)) if isinstance(t, Tensor)}
            if not self._concerned(tensors_of(call.args)) or len(made) != len(tensors_of(call.result)):
                return
            if not any(t.numel() for t in made.values()):  # as of checkpointing before torch 2.12: nothing is passed on
                return
            if getattr(call.node, "dirty_tensors", None):
                raise ControlError(
                    f"The function {call.function.__name__} overwrites its argument, and would do so again and again "
                    "while the network settles. Let its forward return a new tensor, without mark_dirty()."
                )
            args, _ = self._slotted(call.function.apply, call.args, {})
            inputs, passed = slots_in(args), 0
            for slot in inputs:
                passed |= self.passed[slot]
            outputs = {k: self.nameless(t, passed, self._layout_beside(t, inputs)) for k, t in made.items()}
            self.operations.append(Operation(call.function.apply, args, {}, inputs, list(outputs.values())))
            self._own[id(call.node)] = call, self.operations[-1], outputs

    def _layout_beside(self, made: Tensor, inputs: Sequence[Slot]) -> Layout | str:
        """Where the samples lie in what a function of the user's has made: as in an argument of the same shape."""
        like = [self.layouts[s] for s in inputs if self.values[s].shape == made.shape]
        first = FIRST if made.dim() and made.shape[0] == self.batch else "its result has no dimension of the samples"
        return like[0] if like else first

    def _resolve(self, tensor: Tensor) -> Slot | None:
        """The slot of a tensor, which an autograd function may just have returned."""
        slot = self.slots.get(id(tensor))
        if slot is not None or not self._own:
            return slot
        call, noted, outputs = self._own.get(id(tensor.grad_fn), (None, None, {}))
        if call is None or noted is None:
            return None
        if noted in self.operations:
            parts = noted.function, noted.args, noted.kwargs, noted.inputs, noted.outputs
            with self.paused():
                known = surrogate(call.function.__name__, parts, self.values)
            self.operations[self.operations.index(noted)] = known
        slot = outputs[tensor.output_nr]
        self.slots[id(tensor)] = slot
        self.alive[slot] = tensor
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
        slot = self.slots.get(id(tensor))
        if slot is not None:
            return slot
        with self.paused():
            slot = self._resolve(tensor)
            if slot is not None:
                return slot
            refuse_unseen(tensor)
            layout = self._outside.layout(tensor)
            if layout is None and tensor.dim() and (not self.values or tensor.shape[0] == self.batch):
                self.batch, layout = tensor.shape[0], FIRST
            shape = tuple(tensor.shape)
            lost = f"in a tensor of the shape {shape} that is made outside it, {self.batch} samples have no place"
            return self.new(tensor, 0, layout or lost)

    def receive(self, tensor: Tensor) -> None:
        """Take what a layer is given for samples, if it has as many in the first dimension or they are the first."""
        fits = tensor.dim() > 0 and (not self.values or tensor.shape[0] == self.batch)
        known = tensor in self._learning or id(tensor) in self._fixed or self.is_shared(tensor)
        if not known and (fits or tensor.grad_fn is not None):
            self.enter(tensor)

    def expect(self, tree: Any) -> None:
        """Take what a module is given for samples, in the first dimension, if nothing was before."""
        if self.batch or self._paused or self.beside:
            return
        with self.paused():
            self.batch = self._outside.expect(tree)

    def passage(self, arriving: Tensor, handed: Tensor, passed: int = 0) -> Passage:
        """Let ``arriving`` pass a control point.

        Args:
            arriving: the voltage.
            handed: what is handed on for it, without its history.
            passed: bits of parameters that have made it out of sight.
        """
        with self.paused():
            source = self.enter(arriving)
            found = Passage(source, self.new(handed, self.passed[source] | passed, self.layouts[source]))
        self.operations.append(found)
        return found

    def wire(self, arriving: Tensor, handed: Tensor, passed: int) -> Slot:
        """Let ``handed`` stand for ``arriving``, which parameters of these bits have made; the slot of it."""
        with self.paused():
            source = self.enter(arriving)
            target = self.new(handed, self.passed[source] | passed, self.layouts[source])
        self.operations.append(Same(hand_on, [source], {}, [source], [target]))
        return target

    def spread(self, call: Operation) -> Operation | None:
        """Take what a call has made of parameters alone for one for each sample, if it has as many in a row."""
        made = self.tensor(call.outputs[0])
        sources = [*(self.tensor(s) for s in call.inputs), *call.parameters]
        if call.name not in _SPREADING or len(made) != self.batch or len(sources) != 1:
            return None
        with self.paused(), torch.no_grad():
            source = sources[0]
            if source.dim() == made.dim() and len(source) != 1 or not torch.equal(source.expand(made.shape), made):
                return None
            slot = self.slots.get(id(source))
            if slot is None:
                slot = self.new(source, 0, SHARED)
                self.operations.insert(-1, Operation(hand_on, [source], {}, [], [slot]))
        found = Expand(Tensor.expand, [slot, *made.shape], {}, [slot], call.outputs, shape=made.shape)
        self.layouts[call.outputs[0]] = FIRST
        self.operations[-1] = found
        return found

    def look(self, result: Any, whole: bool = False) -> Any:
        """Notice the network's output; ``whole`` says that it is all of what is returned."""
        wanted = self.output is None and (whole or not self.as_returned)
        if wanted and isinstance(result, Tensor) and result.dim() == 2:
            slot = self.slots.get(id(result))
            if slot is not None and self.passed[slot] == self._learning.all and self.layouts[slot] != SHARED:
                self.output = slot
                return self._at_output(result)
        return result

    def reach(self, outputs: Sequence[Any]) -> list[Tensor] | None:
        """Take tensors for the network's output, one after the other, if they depend on all parameters together.

        Of what is no float, and of what no parameter has made, no error comes back.

        Returns:
            What takes their places; None if they are no output, or a matrix, which would have been noticed.
        """
        mine = [
            (k, slot)
            for k, each in enumerate(outputs)
            if (slot := self.slots.get(id(each))) is not None
            and self.passed[slot]
            and not self.shared(slot)
            and each.is_floating_point()
        ]
        passed = functools.reduce(operator.or_, (self.passed[slot] for _, slot in mine), 0)
        if self.output is not None or not mine or not self._learning.is_complete(passed):
            return None
        layouts = [layout for _, slot in mine if isinstance(layout := self.layouts[slot], Layout)]
        if len(layouts) < len(mine):
            return None
        self.as_returned = True  # no part is the output by itself
        firsts = [layout.first(outputs[k]) for (k, _), layout in zip(mine, layouts)]
        parts = [first.flatten(1) for first in firsts]
        whole = self.look(torch.cat(parts, dim=1), whole=True)  # recorded, as this is called while the tape is entered
        found = list(outputs)
        taken = whole.split([part.shape[1] for part in parts], dim=1)
        for (k, _), layout, first, part in zip(mine, layouts, firsts, taken):
            found[k] = layout.back(part.view(first.shape))
        return found

    def close(self) -> None:
        """Let go of all tensors: hooks and tape refer to each other, and would keep them until they are collected."""
        self.operations, self.values, self.alive, self.slots, self._recorders = [], [], [], {}, {}
        self._at_output, self._at_call = lambda output: output, lambda call, result: result
        self._own, self._fixed = {}, {}

    # Slots

    def _concerned(self, given: Sequence[Tensor]) -> bool:
        return any(self._resolve(t) is not None or t in self._learning for t in given)

    def given(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of a module, its tensors of samples replaced by their slots."""

        def place(tensor: Tensor) -> Layout | None:
            return FIRST if tensor.dim() > 1 and tensor.shape[0] == self.batch else None

        with self.paused():
            return self._with_slots(args, place), self._with_slots(kwargs, place)

    def _slotted(self, func: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of a call, its tensors of samples replaced by their slots."""
        tensors = tensors_of([*args, *kwargs.values()])
        places = [(self._place(t), t) for t in tensors]
        near = [(found, t) for found, t in places if isinstance(found, Layout) and found != SHARED]

        def place(tensor: Tensor) -> Layout | None:
            return beside(func, args, kwargs, tensor, near, self.batch)

        return self._with_slots(args, place), self._with_slots(kwargs, place)

    def _place(self, tensor: Tensor) -> Layout | str | None:
        slot = self._resolve(tensor)
        return self._outside.layout(tensor) if slot is None else self.layouts[slot]

    def _with_slots(self, tree: Any, place: Callable[[Tensor], Layout | None]) -> Any:
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
                if not isinstance(tree, nn.Parameter) and id(tree) not in self._fixed:
                    layout = self._outside.layout(tree) or place(tree)
                    slot = None if layout is None else self.new(tree, 0, layout)
            return tree if slot is None else slot
        if isinstance(tree, dict):
            return {k: self._with_slots(v, place) for k, v in tree.items()}
        if type(tree) in (tuple, list):
            return type(tree)(self._with_slots(v, place) for v in tree)
        return tree

    def _keep(self, tensor: Tensor) -> None:
        """Copy what is about to be overwritten: this tensor, and what else lies in its memory."""
        storage = tensor.untyped_storage().data_ptr()
        for slot, (value, owner) in enumerate(zip(self.values, self.alive)):
            if value.untyped_storage().data_ptr() == storage:
                self.values[slot] = value.clone()
                if owner is not tensor:
                    self._stale[id(owner)] = self._calling  # a view, or what this is one of: it changes with it, unseen

    def _record(self, func: Callable[..., Any], args: Any, kwargs: Any, result: Any, overwrites: bool) -> None:
        made = tensors_of(result)
        if not made or (not overwrites and all(id(t) in self.slots for t in made)):
            return  # nothing to follow, or what was there before
        inputs, passed = slots_in((args, kwargs)), self._learning.bits(tensors_of([args, kwargs]))
        for slot in inputs:
            passed |= self.passed[slot]
        if passed and any(t.is_complex() for t in made):
            raise ControlError(
                f"The network computes with complex numbers in {getattr(func, '__name__', func)}, which feedback "
                "control cannot follow. Write it with real ones, or freeze the layers before it with "
                "requires_grad_(False)."
            )
        outputs = [self.new(t, passed) for t in made]
        call = Call(func, args, kwargs, inputs, outputs, self.values)
        for slot, layout in zip(outputs, laid(call, self.layouts)):
            self.layouts[slot] = layout
        self._last = operation(call)
        self.operations.append(self._last)
