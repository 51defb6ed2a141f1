"""Hooks on the layers of a module that record one forward pass of a network of any shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dfc_lightning.errors import ControlError
from dfc_lightning.operations.linear import Same
from dfc_lightning.operations.operation import Frame, Operation, Slot, constant
from dfc_lightning.operations.passage import Passage
from dfc_lightning.passes.record import Record
from dfc_lightning.passes.segment import LAYERS, NamedSegment
from dfc_lightning.recording.assembly import segment_of, site_of
from dfc_lightning.recording.beside import (
    Step,
    cut,
    guarded,
    only_aside,
    only_without_gradients,
    refuse_empty,
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
    """

    record: Record
    frame: Frame
    points: list[ControlPoint]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the points' voltages, without the samples."""
        return [tuple(self.frame[p.target].shape[1:]) for p in self.record.passages]


class Recorder:
    """Records one forward pass; :meth:`before` and :meth:`passed` are hooks of every layer.

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
        self.waiting = {id(p.layer): ControlPoint(p.name, p.layer) for p in points}
        self.tape = Tape(len(points), self._reached, fixed)
        self.heard: dict[int, Slot] = {}
        self.order: list[ControlPoint] = []
        self.passages: list[Passage] = []
        self.step, self.aside = Step(), False
        self.silent: set[str] = set()
        self._at_output, self._dtype = at_output, dtype

    @property
    def beside(self) -> bool:
        """Whether the module is called beside the pass that is recorded: without gradients, for a pseudo-label, say."""
        return self.tape.beside

    def before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook: note what the layer is about to hear."""
        if self.beside:
            self.silent.add(self.names[id(layer)])
            return None
        name, received = self.names[id(layer)], input_of(args, kwargs)
        if wants_input_gradient(name, received):
            self.aside = True
            return with_guard(name, args, kwargs, self.step)
        refuse_empty(name, received)
        if id(layer) not in self.waiting:
            raise called_twice(name)
        self.heard[id(layer)] = self.tape.enter(received)
        return None

    def passed(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Forward hook: hand the output on without its history."""
        if self.beside or wants_input_gradient(self.names[id(layer)], input_of(args, kwargs)):
            return output
        point = self.waiting.pop(id(layer))
        self.order.append(point)
        with self.tape.paused():
            handed = cut(output, point.name)
        self.passages.append(self.tape.passage(output, handed, self.bits[id(layer)]))
        return self.tape.look(handed)

    def close(self) -> None:
        """Let go of what was recorded."""
        self.tape.close()
        self.step.open = False
        self.heard, self.passages = {}, []

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
        with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
            self._join_norms(self.tape.program())
            program = self.tape.program()
            _refuse_detach(program)
            frame = self._full(self.tape.frame(program), program)
            makers: dict[int, Operation] = {s: each for each in program for s in each.outputs}
            users: dict[int, list[Operation]] = {}
            for each in program:
                for s in each.inputs:
                    users.setdefault(s, []).append(each)
            segments = [
                NamedSegment(point.layer, self.heard[id(point.layer)])
                if point.is_named
                else segment_of(point, passage, makers)
                for point, passage in zip(self.order, self.passages)
            ]
            sites = [site_of(passage, users, frame) for passage in self.passages]
            record = Record(program, segments, self.passages, sites, self.tape.output or Slot(0))
        return self._at_output(Recording(record, frame, self.order), output)

    def _join_norms(self, program: Sequence[Operation]) -> None:
        """Let a layer whose voltage nothing but a normalisation hears have its point behind that."""
        users = [s for each in program for s in each.inputs]
        norms = {p.source: k for k, p in enumerate(self.passages) if not self.order[k].is_layer}
        inputs = {s: norms[out] for each in program for out in each.outputs if out in norms for s in each.inputs}
        for point, passage in zip(list(self.order), list(self.passages)):
            joins = isinstance(point.layer, LAYERS) and passage.target in inputs
            if joins and users.count(passage.target) == 1:
                k = inputs[passage.target]
                self.tape.dissolve(passage)
                self.order[k] = point.with_norm(self.order[k].layer)
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
        full = Frame(values, frame.batch, self._dtype)
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
