"""Hooks on the layers of a module that record one forward pass of a network of any shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dfc_lightning.errors import ControlError
from dfc_lightning.operations.arguments import tensors_of
from dfc_lightning.operations.layout import FIRST
from dfc_lightning.operations.linear import Same
from dfc_lightning.operations.operation import Frame, Operation, Slot, constant
from dfc_lightning.operations.passage import Passage
from dfc_lightning.passes.record import Record, finest
from dfc_lightning.passes.segment import LAYERS, NamedSegment
from dfc_lightning.recording.assembly import does_more, is_own_call, is_untaught_norm, segment_of, site_of, uses
from dfc_lightning.recording.beside import (
    Step,
    cut,
    guarded,
    only_aside,
    only_without_gradients,
    refuse_history,
    wants_input_gradient,
)
from dfc_lightning.recording.points import ControlPoint
from dfc_lightning.recording.tape import Tape


class Recording(NamedTuple):
    """What one forward pass was.

    Args:
        record: what was done.
        frame: with what values.
        points: the control points in the order of the pass, each with the normalisation that follows it directly.
        bare: whether what each layer's module is given and returns is what its point is given and returns.
    """

    record: Record
    frame: Frame
    points: list[ControlPoint]
    bare: bool

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the points' voltages, without the samples."""
        return [tuple(self.frame.first(p.target).shape[1:]) for p in self.record.passages]


class Recorder:
    """Records one forward pass; :meth:`before` and :meth:`passed` are hooks of every layer.

    The point of a layer lies where its forward calls torch's own function with its parameters, whatever that forward
    does before and after; that of a named module is what it returns.

    Args:
        points: the layers and normalisations that are to be passed.
        at_output: called with the recording and the output; what it returns takes the output's place.
        dtype: of the recorded values.
        fixed: see :class:`Tape`.
    """

    def __init__(
        self,
        points: Sequence[ControlPoint],
        at_output: Callable[[Recording, Tensor], Tensor],
        dtype: torch.dtype,
        fixed: Iterable[Tensor] = (),
    ) -> None:
        self.names = {id(p.layer): p.name for p in points}
        self.bits = {key: 1 << k for k, key in enumerate(self.names)}
        self.waiting = {id(p.layer): replace(p, norm=None) for p in points}
        self.tape = Tape(len(points), self._reached, self._called, fixed)
        self.order: list[ControlPoint] = []
        self.passages: list[Passage] = []
        self.step, self.aside = Step(), False
        self.silent: set[str] = set()
        self._running: list[tuple[nn.Module, Any]] = []  # layers, each with what it was given
        self._named: dict[int, NamedSegment] = {}
        self._aside: dict[Slot, str] = {}  # what named modules return beside their voltages
        self._bare = True
        self._at_output, self._dtype = at_output, dtype

    @property
    def beside(self) -> bool:
        """Whether the module is called beside the pass that is recorded: without gradients, for a pseudo-label, say."""
        return self.tape.beside

    def arriving(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of what the layers are in: what the outermost is given are the samples."""
        self.tape.expect([args, kwargs])

    def before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook: note what the layer is about to hear."""
        if self.beside:
            self.silent.add(self.names[id(layer)])
            return None
        name = self.names[id(layer)]
        given = tensors_of([args, kwargs])
        if not given:
            raise ControlError(
                f"The module {name!r} is called without a tensor among its arguments. Call it with tensors, each an "
                "argument or in a tuple, list or dict: a sequence that is packed, say, as a padded one."
            )
        if any([wants_input_gradient(name, each) for each in given]):
            self.aside = True
            return with_guard(name, args, kwargs, self.step)
        if id(layer) not in self.waiting:
            raise called_twice(name)
        self.tape.enter(given[0])
        if not self.waiting[id(layer)].is_named:
            self._running.append((layer, given[0]))
            return None
        with self.tape.paused():
            buffers = {key: buffer.clone() for key, buffer in layer.named_buffers()}
        slots = self.tape.given(args, kwargs)
        self._named[id(layer)] = NamedSegment(layer, *slots, buffers, [Slot(len(self.tape.masks))])
        return None

    def passed(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook: hand the output on, that of a named module without its history."""
        given = tensors_of([args, kwargs])
        if self.beside or any([wants_input_gradient(self.names[id(layer)], each) for each in given]):
            return output
        name = self.names[id(layer)]
        if id(layer) in self._named:
            return self._named_passed(layer, name, output)
        _, received = self._running.pop()
        if id(layer) in self.waiting:
            raise does_more(name)
        passage = self.passages[-1]
        heard = self.tape.maker(passage.source).inputs[0]
        if self.tape.slot(output) != passage.target or self.tape.slot(received) != heard:
            self._bare = False
        return output

    def _called(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Any:
        """Put the point of the layer that is running where its parameters are used."""
        layer = self._running[-1][0] if self._running else None
        if layer is None or not uses(layer, args, kwargs):
            return result
        if id(layer) not in self.waiting or not is_own_call(layer, func, args, kwargs):
            raise does_more(self.names[id(layer)])
        received = args[0] if args else kwargs["input"]
        refuse_history(f"The input of the layer {self.names[id(layer)]!r}", received)
        return self._pass(layer, result)

    def _pass(self, layer: nn.Module, voltage: Tensor) -> Tensor:
        point = self.waiting.pop(id(layer))
        self.order.append(point)
        with self.tape.paused():
            handed = cut(voltage, point.name)
        self.passages.append(self.tape.passage(voltage, handed, self.bits[id(layer)]))
        return handed

    def _named_passed(self, layer: nn.Module, name: str, output: Any) -> Any:
        masks = self.tape.masks[self._named[id(layer)].masks[0] :]
        self._named[id(layer)] = replace(self._named[id(layer)], masks=masks)
        voltage, *others = output if type(output) in (tuple, list) else [output]
        if not isinstance(voltage, Tensor):
            raise ControlError(
                f"The module {name!r} returns {type(output).__name__}. One that is named in extra_points returns a "
                "tensor, its voltage, or a tuple of which that is the first; call it from a module that does."
            )
        handed = self.tape.look(self._pass(layer, voltage))
        return type(output)([handed, *self._set_aside(others, layer)]) if type(output) in (tuple, list) else handed

    def _set_aside(self, tree: Any, layer: nn.Module) -> Any:
        """What a named module returns beside its voltage, as it is; that nothing is made of it is seen at the end."""
        if isinstance(tree, Tensor):
            name = self.names[id(layer)]
            with self.tape.paused():
                handed = cut(tree, name)
            self._aside[self.tape.wire(tree, handed, self.bits[id(layer)])] = name
            return handed
        if type(tree) in (tuple, list):
            return type(tree)(self._set_aside(each, layer) for each in tree)
        return tree

    def close(self) -> None:
        """Let go of what was recorded."""
        self.tape.close()
        self.step.open = False
        self.passages, self._running, self._named = [], [], {}

    def check_complete(self) -> None:
        """Complain of layers that the pass did not reach, or that did not reach the output."""
        if self.aside and not self.order:
            raise only_aside()
        if self.waiting:
            names = [self.names[key] for key in self.waiting]
            raise (
                only_without_gradients(names) if self.silent.issuperset(names) else not_reached(names, bool(self.order))
            )
        if self.tape.output is None:
            lost = [self.names[key] for key, bit in self.bits.items() if not self.tape.reaches_end(bit)]
            raise ControlError(
                "The network has no output of the shape (B, n_L) that depends on all its layers"
                + (f": that of {', '.join(lost)} is lost on the way. " if lost else ". ")
                + "Feedback control drives one such output to a target; flatten or average what has more dimensions, "
                "and let every controlled layer contribute, in torch functions of tensors (what numpy or torch.jit "
                "computes is out of sight), or name a submodule with network='…'."
            )

    def _reached(self, output: Tensor) -> Tensor:
        refuse_history("The network's output", output)
        with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
            self._join_norms(self.tape.program())
            program = self.tape.program()
            _refuse_detach(program)
            self._refuse_aside(program)
            frame = self._full(finest(self.tape.frame(program), program), program)
            makers: dict[int, Operation] = {s: each for each in program for s in each.outputs}
            users: dict[int, list[Operation]] = {}
            for each in program:
                for s in each.inputs:
                    users.setdefault(s, []).append(each)
            segments = [
                self._named[id(point.layer)] if point.is_named else segment_of(point, passage, makers)
                for point, passage in zip(self.order, self.passages)
            ]
            sites = [site_of(passage, users, frame) for passage in self.passages]
            record = Record(program, segments, self.passages, sites, self.tape.output or Slot(0))
        layout = frame.layouts[record.output]
        handed = layout.first(output).flatten(1) if layout != FIRST else output
        taken = self._at_output(Recording(record, frame, self.order, self._bare), handed)
        if layout == FIRST:
            return taken
        return layout.back(taken.view(layout.first(output).shape))

    def _refuse_aside(self, program: Sequence[Operation]) -> None:
        for each in program:
            for slot in each.inputs:
                if slot in self._aside:
                    raise ControlError(
                        f"The network's output depends on what the module {self._aside[slot]!r} returns beside its "
                        "first tensor. Of a module that is named in extra_points that one is the voltage, and the rest "
                        "is not controlled: make what follows of the first, such as output[:, -1] of an LSTM for its "
                        "last state, or call it from a module that returns what is needed, and name that."
                    )

    def _join_norms(self, program: Sequence[Operation]) -> None:
        """Let a layer whose voltage nothing but a normalisation hears have its point behind that."""
        users = [s for each in program for s in each.inputs]
        untaught = {each.inputs[0]: each for each in program if is_untaught_norm(each)}
        norms = {p.source: k for k, p in enumerate(self.passages) if not self.order[k].is_layer}
        inputs = {s: norms[out] for each in program for out in each.outputs if out in norms for s in each.inputs}
        for point, passage in zip(list(self.order), list(self.passages)):
            if not isinstance(point.layer, LAYERS) or point.is_named or users.count(passage.target) != 1:
                continue
            if passage.target in inputs:
                k = inputs[passage.target]
                self.tape.dissolve(passage)
                self.order[k] = point.with_norm(self.order[k].layer)
            elif passage.target in untaught:
                moved = self.tape.move_behind(passage, untaught[passage.target])
                self.passages[self.passages.index(passage)] = moved
        kept = [k for k, p in enumerate(self.passages) if not isinstance(self.tape.maker(p.target), Same)]
        self.order, self.passages = [self.order[k] for k in kept], [self.passages[k] for k in kept]
        for index, passage in enumerate(self.passages):
            passage.index = index

    def _full(self, frame: Frame, program: Sequence[Operation]) -> Frame:
        """The values in the dtype of the recording: after autocast those of another pass, to settle from."""
        floats = [v for v in frame.values if v is not None and v.is_floating_point()]
        if all(v.dtype == self._dtype for v in floats):
            return frame
        values = [None if v is None else constant(v, self._dtype) for v in frame.values]
        full = Frame(values, frame.batch, self._dtype, frame.layouts)
        for each in program:
            for slot, value in zip(each.outputs, each.values(full)):
                full.values[slot] = value
        return full


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a layer is called with."""
    return args[0] if args else kwargs["input"]


def with_guard(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], step: Step) -> Any:
    """The arguments of a call for the gradient by its input, or None for as they are."""
    with_ = guarded(name, input_of(args, kwargs), step)
    if with_ is None:
        return None
    return ((with_, *args[1:]), kwargs) if args else (args, {**kwargs, "input": with_})


def called_twice(name: str) -> ControlError:
    """What to say of a layer that is called again before the step is over."""
    return ControlError(
        f"The layer {name!r} is called twice in one step. Feedback control settles one pass of the network; call it "
        "once in training_step, and use each layer once in it."
    )


def not_reached(names: list[str], some: bool) -> ControlError:
    """What to say of layers that a pass did not reach; ``some`` if it has reached others."""
    if not some:
        return ControlError(
            f"The network was not called: none of its layers ({', '.join(names)}) was run in this step. Call it once "
            "in training_step; a module compiled before training hides its layers, so compile it later."
        )
    return ControlError(
        f"The layers {', '.join(names)} were not run in this step, and cannot be taught. Freeze them with "
        "requires_grad_(False), or name the submodule to control with network='…'."
    )


def _refuse_detach(program: Sequence[Operation]) -> None:
    if any(each.name == "detach" or each.function == Tensor.data.__get__ for each in program):  # type: ignore[attr-defined]
        raise ControlError(
            "The network's output depends on a detach(), or on .data, within it: what is fed forward there, no error "
            "comes back for. Take it out, write it as an autograd.Function with a backward of its own, or freeze the "
            "layers before it with requires_grad_(False)."
        )
