"""Hooks on the layers of a module that record one forward pass of a network of any shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dfc_lightning.control.checks import ControlError
from dfc_lightning.control.nonlinearity import Identity
from dfc_lightning.control.operations import (
    Frame,
    Operation,
    Product,
    Rate,
    Reshape,
    Same,
    Slot,
    Sum,
    Weighted,
    constant,
)
from dfc_lightning.control.points import ControlPoint
from dfc_lightning.control.pooling import MaxPool
from dfc_lightning.control.segments import LAYERS, NamedSegment, Segment
from dfc_lightning.control.tape import Passage, Tape
from dfc_lightning.control.wiring import GraphActivity, Site, Wiring


class GraphWatch:
    """The record of one forward pass; :meth:`before` and :meth:`passed` are hooks of every layer.

    Args:
        points: the layers and normalisations that are to be passed.
        at_output: called with the activity, the points in order and the output; what it returns takes its place.
        dtype: of the activity.
        fixed: see :class:`Tape`.
    """

    def __init__(
        self,
        points: Sequence[ControlPoint],
        at_output: Callable[[GraphActivity, list[ControlPoint], Tensor], Tensor],
        dtype: torch.dtype,
        fixed: Iterable[Tensor] = (),
    ) -> None:
        parts = {id(m): ControlPoint(p.name, m) for p in points for m in (p.layer, p.norm) if m is not None}
        self.names = {id(p.layer): p.name for p in points} | {id(p.norm): f"{p.name}'s norm" for p in points if p.norm}
        self.bits = {key: 1 << k for k, key in enumerate(parts)}
        self.waiting = parts
        self.tape = Tape(len(parts), self._reached, fixed)
        self.heard: dict[int, Slot] = {}
        self.order: list[ControlPoint] = []
        self.passages: list[Passage] = []
        self.modes: list[TorchFunctionMode] = [self.tape]
        self._at_output, self._dtype = at_output, dtype

    def before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: note what the layer is about to hear."""
        name = self.names[id(layer)]
        if id(layer) not in self.waiting:
            raise called_twice(name)
        received = args[0] if args else kwargs["input"]
        refuse_history(name, received)
        self.heard[id(layer)] = self.tape.enter(received)

    def passed(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Forward hook: hand the output on without its history."""
        self.order.append(self.waiting.pop(id(layer)))
        handed, passage = self.tape.passage(output, self.bits[id(layer)])
        self.passages.append(passage)
        return self.tape.look(handed)

    def close(self) -> None:
        """Let go of what was recorded."""
        self.tape.close()
        self.heard = {}
        self.passages = []

    def check_complete(self) -> None:
        """Complain of layers that the pass did not reach, or that did not reach the output."""
        if self.waiting:
            raise not_reached([self.names[key] for key in self.waiting], bool(self.order))
        if self.tape.output is None:
            lost = [self.names[key] for key, bit in self.bits.items() if not self.tape.reaches_end(bit)]
            raise ControlError(
                "The network has no output of the shape (B, n_L) that depends on all its layers"
                + (f": that of {', '.join(lost)} is lost on the way. " if lost else ". ")
                + "Feedback control drives one such output to a target; flatten or average what has more dimensions, "
                "and let every controlled layer contribute, in torch functions of tensors, or name a submodule with "
                "network='…'."
            )

    def _reached(self, output: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
            self._join_norms(self.tape.program())
            program = self.tape.program()
            for each in program:
                if each.name == "detach":
                    raise ControlError(
                        "The network's output depends on a detach() within it: what is fed forward there, no error "
                        "comes back for. Take it out, or freeze the layers before it with requires_grad_(False)."
                    )
            makers: dict[int, Operation] = {s: each for each in program for s in each.outputs}
            users: dict[int, list[Operation]] = {}
            for each in program:
                for s in each.inputs:
                    users.setdefault(s, []).append(each)
            frame = self._frame(program)
            wiring = Wiring(
                program,
                [
                    NamedSegment(p.layer, self.heard[id(p.layer)]) if p.is_named else _segment(p, passage, makers)
                    for p, passage in zip(self.order, self.passages)
                ],
                self.passages,
                [_site(passage, users, frame) for passage in self.passages],
                self.tape.output or Slot(0),
            )
            activity = GraphActivity(wiring, frame)
        return self._at_output(activity, self.order, output)

    def _join_norms(self, program: Sequence[Operation]) -> None:
        """Let a layer whose voltage nothing but a normalisation hears have its point behind that."""
        users = [s for each in program for s in each.inputs]
        norms = {p.source: k for k, p in enumerate(self.passages) if not self.order[k].is_layer}
        inputs = {s: norms[out] for each in program for out in each.outputs if out in norms for s in each.inputs}
        for point, passage in zip(list(self.order), list(self.passages)):
            joins = isinstance(point.layer, LAYERS) and passage.target in inputs
            if joins and users.count(passage.target) == 1:
                k = inputs[passage.target]
                point.norm = self.order[k].layer
                self.tape.dissolve(passage)
                self.order[k] = point
        kept = [k for k, p in enumerate(self.passages) if not isinstance(self.tape.maker(p.target), Same)]
        self.order, self.passages = [self.order[k] for k in kept], [self.passages[k] for k in kept]
        for index, passage in enumerate(self.passages):
            passage.index = index

    def _frame(self, program: Sequence[Operation]) -> Frame:
        frame = self.tape.frame()
        used = {int(s) for each in program for s in (*each.inputs, *each.outputs)}
        frame.values = [v if k in used else None for k, v in enumerate(frame.values)]
        floats = [v for v in frame.values if v is not None and v.is_floating_point()]
        if all(v.dtype == self._dtype for v in floats):
            return frame
        values = [None if v is None else constant(v, self._dtype) for v in frame.values]
        full = Frame(values, frame.batch, self._dtype)  # autocast: a pass in full precision to settle from
        for each in program:
            for slot, value in zip(each.outputs, each.values(full)):
                full.values[slot] = value
        return full


def called_twice(name: str) -> ControlError:
    """What to say of a layer that is called again before the step is over."""
    return ControlError(
        f"The layer {name!r} is called twice in one step. Feedback control settles one pass of the network; call it "
        "once in training_step, and use each layer once in it."
    )


def refuse_history(name: str, received: Tensor) -> None:
    """Complain of an input that was made by something that wants to learn."""
    if received.requires_grad and torch.is_grad_enabled():
        raise ControlError(
            f"The input of the layer {name!r} wants a gradient, but feedback control sends none back through a layer: "
            "what computes it would not learn. Freeze that with requires_grad_(False), or detach() it."
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


_NORMS = ("batch_norm", "group_norm", "layer_norm", "rms_norm")
_POOLING = tuple(f"{kind}pool{n}d" for kind in ("max_", "avg_", "adaptive_avg_", "adaptive_max_") for n in (1, 2, 3))


def _segment(point: ControlPoint, passage: Passage, makers: dict[int, Operation]) -> Segment:
    last = makers.get(passage.source)
    layer: Operation | None = last
    norm: Operation | None = None
    if not isinstance(point.layer, LAYERS) or point.norm is not None:
        norm, layer = last, None
        if norm is not None and point.norm is not None:
            wire = makers[norm.inputs[0]]
            layer = makers[wire.inputs[0]]
    normed = point.layer if layer is None else point.norm
    first = layer or norm
    plain = first is not None and len(first.inputs) == 1
    if layer is not None:
        plain = plain and isinstance(layer, Weighted) and _has(layer, point.layer)
    if norm is not None:
        plain = plain and norm.name in _NORMS and _has(norm, normed)
    if not plain:
        raise ControlError(
            f"The layer {point.name!r} does more than multiply its input with its weights. Feedback control teaches "
            "torch's own linear and convolutional layers and normalisations; name it in extra_points=['…'], or freeze "
            "it with requires_grad_(False)."
        )
    return Segment(
        layer,
        norm,
        point.layer.weight if layer is not None else None,  # type: ignore[arg-type]
        point.layer.bias if layer is not None else None,  # type: ignore[arg-type]
        getattr(normed, "weight", None),
        getattr(normed, "bias", None),
    )


def _has(call: Operation, module: nn.Module | None) -> bool:
    """Whether a call was given a module's own parameters, as they are."""
    given = [id(value) for value in (*call.args, *call.kwargs.values())]
    return all(id(p) in given for p in (module.parameters(recurse=False) if module is not None else ()))


def _site(passage: Passage, users: dict[int, list[Operation]], frame: Frame) -> Site:
    """Follow the voltage to its nonlinearity: through sums with other branches, and pooling and the like."""
    slot, in_place, shape = passage.target, True, frame[passage.target].shape
    pool: MaxPool | None = None
    while len(following := users.get(slot, [])) == 1:
        each = following[0]
        if isinstance(each, Rate):
            after = users.get(each.outputs[0], [])
            if pool is None and in_place and len(after) == 1 and isinstance(after[0], MaxPool):
                pool = after[0]
            return Site(each.phi, each if in_place else None, pool)
        if isinstance(each, MaxPool) and slot == passage.target:
            pool = each
        if not isinstance(each, (Sum, Same, Reshape, Product)) and not each.name.startswith(_POOLING):
            break
        slot = each.outputs[0]
        in_place = in_place and isinstance(each, (Sum, Same)) and frame[slot].shape == shape
    return Site(Identity())
