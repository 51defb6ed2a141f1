"""Hooks on the layers of a module that record one forward pass of a network of any shape."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dfc_lightning.errors import ControlError
from dfc_lightning.operations.arguments import mapped, tensors_of
from dfc_lightning.operations.layout import FIRST
from dfc_lightning.operations.linear import Same
from dfc_lightning.operations.operation import Frame, Operation, Slot, constant
from dfc_lightning.operations.passage import Passage
from dfc_lightning.passes.record import Record, finest
from dfc_lightning.passes.segment import LAYERS, NORMS, NamedSegment, Segment
from dfc_lightning.passes.use import UseSegment, use_segment
from dfc_lightning.recording.assembly import is_own_call, is_untaught_norm, own_segment, segment_of, site_of
from dfc_lightning.recording.beside import (
    Step,
    cut,
    only_aside,
    only_without_gradients,
    refuse_history,
    wants_input_gradient,
    with_guard,
)
from dfc_lightning.recording.learning import Learning
from dfc_lightning.recording.opened import KERNELS
from dfc_lightning.recording.points import ControlPoint
from dfc_lightning.recording.refusals import called_twice, hidden, not_reached, refuse_detach
from dfc_lightning.recording.tape import Tape


class Recording(NamedTuple):
    """What one forward pass was.

    Args:
        record: what was done.
        frame: with what values.
        points: the control points in the order of the pass, each with the normalisation that follows it directly.
        bare: whether what each layer's module is given and returns is what its point is given and returns.
        idle: names of what might have been points, but whose parameters other modules use alone.
    """

    record: Record
    frame: Frame
    points: list[ControlPoint]
    bare: bool
    idle: list[str]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the points' voltages, without the samples."""
        return [tuple(self.frame.first(p.target).shape[1:]) for p in self.record.passages]


class Recorder:
    """Records one forward pass; :meth:`before` and :meth:`passed` are hooks of every module that has parameters.

    A point lies wherever samples meet parameters: where a layer's forward calls torch's own function with its
    parameters, whatever that forward does before and after, and at any other call that is given some, or what is made
    of them. That of a named module is what it returns.

    Args:
        points: what may be points.
        at_output: called with the recording and the output; what it returns takes the output's place.
        dtype: of the recorded values.
        fixed: see :class:`Tape`.
        as_returned: whether the output is all that the outermost module returns, not the first matrix.
        idle: see :class:`Learning`.
    """

    def __init__(
        self,
        points: Sequence[ControlPoint],
        at_output: Callable[[Recording, Tensor], Tensor],
        dtype: torch.dtype,
        fixed: Iterable[Tensor] = (),
        as_returned: bool = False,
        idle: Container[str] = (),
    ) -> None:
        self.learning = Learning(points, self._leaves, idle)
        self.names = {id(p.layer): p.name for p in reversed(points)}
        self.waiting = {id(p.layer): p for p in points if p.is_named}
        self.tape = Tape(self.learning, self._reached, self._called, fixed, as_returned)
        self.order: list[ControlPoint] = []
        self.passages: list[Passage] = []
        self.step, self.aside = Step(), False
        self.silent: set[str] = set()
        self._received: list[Tensor] = []  # what each module of ``learning.running`` was given
        self._named: dict[int, NamedSegment] = {}
        self._uses: dict[int, Segment | UseSegment] = {}  # by passage
        self._aside: dict[Slot, str] = {}  # what named modules return beside their voltages
        self._bare, self._depth = True, 0
        self._at_output, self._dtype = at_output, dtype

    @property
    def beside(self) -> bool:
        """Whether the module is called beside the pass that is recorded: without gradients, for a pseudo-label, say."""
        return self.tape.beside

    def arriving(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of what the layers are in: what the outermost is given are the samples."""
        self._depth += 1
        self.tape.expect([args, kwargs])

    def returning(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook of what the layers are in: what the outermost returns is the output, if none was seen before."""
        self._depth -= 1
        given = tensors_of(output)
        if self._depth or self.beside or self.tape.output is not None or not given:
            return output
        reached = self.tape.reach(given)
        if reached is None:
            return output
        instead = {id(old): new for old, new in zip(given, reached)}
        return mapped(output, lambda tensor: instead[id(tensor)])

    def before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook: note what the module is about to hear."""
        name = self.names[id(layer)]
        if self.beside:
            self.silent.add(name)
            return None
        given = tensors_of([args, kwargs])
        named, layerlike = id(layer) in self.learning.modules, isinstance(layer, (*LAYERS, *NORMS))
        if not given and (named or layerlike):
            raise ControlError(
                f"The module {name!r} is called without a tensor among its arguments. Call it with tensors, each an "
                "argument or in a tuple, list or dict: a sequence that is packed, say, as a padded one."
            )
        samples = [each for each in given if not self.tape.is_shared(each)]
        if (named or layerlike) and any([wants_input_gradient(name, each) for each in samples]):
            self.aside = True
            return with_guard(name, args, kwargs, self.step)
        if self.tape.output is not None or (named and id(layer) not in self.waiting):
            raise called_twice(name)
        if given and (named or layerlike or not self.tape.batch):
            self.tape.receive(given[0])
        if not named:
            self.learning.running.append(layer)
            self._received.append(given[0] if given else torch.empty(0))
            return None
        with self.tape.paused():
            buffers = {key: buffer.clone() for key, buffer in layer.named_buffers()}
        slots = self.tape.given(args, kwargs)
        self._named[id(layer)] = NamedSegment(layer, *slots, buffers, [Slot(len(self.tape.masks))])
        return None

    def passed(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook: hand the output of a named module on without its history."""
        if self.beside:
            return output
        if id(layer) in self.learning.modules:
            name = self.names[id(layer)]
            if id(layer) not in self._named or any(
                [wants_input_gradient(name, each) for each in tensors_of([args, kwargs])]
            ):
                return output
            return self._named_passed(layer, name, output)
        if not self.learning.running or self.learning.running[-1] is not layer:
            return output  # left to autograd
        self.learning.running.pop()
        received, passage = self._received.pop(), self.passages[-1] if self.passages else None
        if passage is None or self.order[-1].layer is not layer or not self.order[-1].is_module:
            self._bare = False
        elif (
            self.tape.slot(output) != passage.target
            or self.tape.slot(received) != self.tape.maker(passage.source).inputs[0]
        ):
            self._bare = False
        return output

    def _leaves(self, name: str, given: Sequence[Tensor]) -> bool:
        """Whether parameters are called with something that wants a gradient by itself."""
        others = [t for t in given if t not in self.learning and t.requires_grad and not self.tape.is_shared(t)]
        if not any([wants_input_gradient(name, each) for each in others]):
            return False
        self.aside = True
        return True

    def _called(self, call: Operation, result: Any) -> Any:
        """Put a point where samples meet parameters."""
        if not any(p in self.learning for p in call.parameters) and not any(map(self.tape.shared, call.inputs)):
            return result
        if call.name in KERNELS:
            raise hidden(call.name, self.learning.names(self.learning.bits(call.parameters)))
        if all(map(self.tape.shared, call.outputs)):
            spread = self.tape.spread(call)
            if spread is None:
                return result
            call = spread
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        for slot in call.inputs:
            if not self.tape.shared(slot) and self.tape.tensor(slot) is not result:
                refuse_history(f"What is given to {call.name}, beside parameters,", self.tape.tensor(slot))
        point, segment = self._point(call)
        overwrites = any(self.tape.tensor(s) is result for s in call.inputs) and not result._is_view()
        return self._pass(point, result, segment, in_place=overwrites)

    def _point(self, call: Operation) -> tuple[ControlPoint, Segment | UseSegment | None]:
        """The point of a call, and its segment if that is no layer's own call."""
        shared = any(map(self.tape.shared, call.inputs))
        own: list[ControlPoint] = []
        layer: Segment | None = None
        names = {p.name for p in self.order}
        if not shared:
            learned = [p for p in call.parameters if p in self.learning]
            places = [place for p in learned for place in self.learning.places(p)]
            own = [p for p in places if p.is_module and is_own_call(p.layer, call)]
            new = next((p for p in own if p.name not in names), None)
            if new is not None:
                return new, None
            layer = own_segment(call, learned)
        makers = self.tape.makers() if shared else {}
        segment = layer or use_segment(call, makers, self.tape.layouts, self.learning)
        first = own[0] if own else self.learning.places(next(p for p in segment.parameters if p in self.learning))[0]
        name = first.name.partition(".parametrizations.")[0]
        name = next(n for k in itertools.count(1) if (n := name if k == 1 else f"{name}#{k}") not in names)
        return ControlPoint(
            name, first.layer, use=tuple(segment.parameters), multiplies=None if layer is None else layer.weight
        ), segment

    def _pass(
        self,
        point: ControlPoint,
        voltage: Tensor,
        segment: Segment | UseSegment | None = None,
        passed: int = 0,
        in_place: bool = False,
    ) -> Tensor:
        self.order.append(point)
        with self.tape.paused():
            handed = cut(voltage, point.name, in_place)
        self.passages.append(self.tape.passage(voltage, handed, passed))
        if segment is not None:
            self._uses[id(self.passages[-1])] = segment
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
        bit = self.learning.modules[id(layer)]
        self.learning.used |= bit
        handed = self.tape.look(self._pass(self.waiting.pop(id(layer)), voltage, passed=bit))
        return type(output)([handed, *self._set_aside(others, layer)]) if type(output) in (tuple, list) else handed

    def _set_aside(self, tree: Any, layer: nn.Module) -> Any:
        """What a named module returns beside its voltage, as it is; that nothing is made of it is seen at the end."""
        if isinstance(tree, Tensor):
            name = self.names[id(layer)]
            with self.tape.paused():
                handed = cut(tree, name)
            self._aside[self.tape.wire(tree, handed, self.learning.modules[id(layer)])] = name
            return handed
        if type(tree) in (tuple, list):
            return type(tree)(self._set_aside(each, layer) for each in tree)
        return tree

    def close(self) -> None:
        """Let go of what was recorded."""
        self.tape.close()
        self.step.open = False
        self.passages, self._received, self._named, self._uses = [], [], {}, {}
        self.learning.close()

    def check_complete(self) -> None:
        """Complain of layers that the pass did not reach, or that did not reach the output."""
        if self.aside and not self.order:
            raise only_aside()
        learning = self.learning
        names = learning.names(learning.all & ~learning.used)
        if names:
            raise (
                only_without_gradients(names) if self.silent.issuperset(names) else not_reached(names, bool(self.order))
            )
        if self.tape.output is None:
            lost = learning.names(learning.all & ~self.tape.end())
            raise ControlError(
                "The network has no output of the shape (B, n_L) that depends on all its layers"
                + (f": that of {', '.join(lost)} is lost on the way. " if lost else ". ")
                + "Feedback control drives one such output to a target; flatten or average what has more dimensions, "
                "and let every controlled layer contribute, in torch functions of tensors (what numpy or torch.jit "
                "computes is out of sight), or name a submodule with network='…'."
            )

    def _reached(self, output: Tensor) -> Tensor:
        assert self.tape.output is not None
        refuse_history("The network's output", output)
        with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
            self._join_norms(self.tape.program())
            program = self.tape.program()
            refuse_detach(program, self.tape.layouts)
            self._refuse_aside(program)
            frame = self._full(finest(self.tape.frame(program), program), program)
            makers = self.tape.makers()
            users: dict[int, list[Operation]] = {}
            for each in program:
                for s in each.inputs:
                    users.setdefault(s, []).append(each)
            segments = [
                self._named[id(point.layer)]
                if point.is_named
                else self._uses.get(id(passage)) or segment_of(point, passage, makers)
                for point, passage in zip(self.order, self.passages)
            ]
            sites = [site_of(passage, users, frame) for passage in self.passages]
            record = Record(program, segments, self.passages, sites, self.tape.output)
        layout = frame.layouts[record.output]
        handed = layout.first(output).flatten(1) if layout != FIRST else output
        taken = self._at_output(
            Recording(record, frame, self.order, self._bare, self.learning.names(self.learning.idle)), handed
        )
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
            if not isinstance(point.layer, LAYERS) or not point.is_module or users.count(passage.target) != 1:
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
