"""Any network under control: convolutions, branches, residual sums and normalisation between the control points.

The operations of a forward pass are made again, in deviations from that pass, with Q_i u added at each control point,
and backwards for errors. A point's voltage v_i is the output of a linear or convolutional layer, or of the
normalisation that follows it directly, so that no teaching signal has to travel back through another layer's weights
to reach a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from dfc_lightning.losses.linked_loss import LinkedLoss
from dfc_lightning.operations.batch_norm import BatchNorm
from dfc_lightning.operations.layout import FIRST, Layout
from dfc_lightning.operations.nonlinearity import Identity
from dfc_lightning.operations.operation import Deviations, Frame, constant
from dfc_lightning.operations.passage import Passage
from dfc_lightning.passes.chance import Chance
from dfc_lightning.passes.forward_pass import ForwardPass, Unit
from dfc_lightning.passes.plasticity import Plasticity
from dfc_lightning.passes.record import Record
from dfc_lightning.passes.recorded_deviation import RecordedDeviation, slot_first, slot_matrix

MEAN_OVER = 8
"""Samples that the batch-mean gain is taken from."""

ROWS_AT_ONCE = 512
"""Rows of Jacobians that ride back through the network together."""


@dataclass(eq=False)
class RecordedPass(ForwardPass[RecordedDeviation]):
    """A feedforward pass of a network of any shape.

    Args:
        record: what was done.
        frame: with what values.
        ports: the shape of each port: that of the point's voltage, or with ones where all positions hear the same.
        feedback: Q_i, (n_i, n_L), n_i the units of a port; or B_i, in the shape of W_i.
        layered: see :class:`ForwardPass`.
        unit: likewise.
        chance: likewise.
        loss: likewise.
    """

    record: Record
    frame: Frame
    ports: Sequence[tuple[int, ...]]
    feedback: Sequence[Tensor] = ()
    layered: bool = False
    unit: Unit | None = None
    chance: Chance = field(default_factory=lambda: Chance(0, 0))
    loss: LinkedLoss | None = None

    @cached_property
    def widths(self) -> list[int]:  # type: ignore[override]
        return [math.prod(port) for port in self.ports]

    @property
    def output(self) -> Tensor:
        return slot_matrix(self.frame.layouts, self.record.output, self.frame[self.record.output])

    @property
    def v(self) -> list[Tensor]:  # type: ignore[override]
        return [self.frame.first(p.target) for p in self.record.passages]

    @cached_property
    def slopes(self) -> list[Tensor]:  # type: ignore[override]
        found = []
        for site, passage in zip(self.record.sites, self.passages):
            v = self.frame[passage.target]
            slope = site.phi.slope(v, site.phi(v)) if site.operation is None else site.operation.slope(self.frame)
            slope = slope if site.pool is None else slope * site.pool.wins(self.frame)
            found.append(self._layout(passage).first(slope))
        return found

    @property
    def presynaptic(self) -> list[Tensor]:
        return [self.frame.first(s.heard) for s in self.record.segments]

    def _layout(self, passage: Passage) -> Layout:
        return self.frame.layouts[passage.target]

    @property
    def somata(self) -> Sequence[int]:
        return self.record.somata

    @property
    def batched(self) -> bool:
        return any(isinstance(each, BatchNorm) and each.by_batch for each in self.record.program)

    @property
    def able(self) -> list[Tensor]:
        found = []
        for slope, port in zip(self.slopes, self.ports):
            shared = [k for k, (one, n) in enumerate(zip(port, slope.shape[1:]), start=1) if one != n]
            largest = slope.abs().amax(shared) if shared else slope
            found.append((largest != 0).to(slope).flatten(1))
        return found

    def made_of(self) -> list[Tensor]:
        parameters = (p for segment in self.record.segments for p in segment.parameters)
        return [*self.presynaptic, *self.v, *parameters]

    def samples(self, index: Tensor) -> RecordedPass:
        unit = None if self.unit is None else Unit(*(each[index] for each in self.unit))
        return replace(self, frame=self.record.samples(self.frame, index), unit=unit)

    def with_feedback(self, feedback: Sequence[Tensor], layered: bool = False) -> RecordedPass:
        same = super().with_feedback(feedback, layered)
        if layered:  # feedback tells all units of a map apart
            same.ports = [tuple(v.shape[1:]) for v in self.v]
        return same

    def again(self) -> RecordedPass:
        return replace(self, frame=self.record.again(self.frame), unit=None)

    # Under control

    def _direct(self, u: Tensor) -> list[Tensor]:
        return self.spread([u @ q.T for q in self.feedback])

    def spread(self, ports: Sequence[Tensor]) -> list[Tensor]:
        return [a.reshape(-1, *port).expand_as(v) for a, port, v in zip(ports, self.ports, self.v)]

    def gathered(self, errors: Sequence[Tensor]) -> list[Tensor]:
        found = []
        for error, port in zip(errors, self.ports):
            shape = (error.shape[0], *port)
            found.append((error if error.shape == shape else error.sum_to_size(shape)).flatten(1))
        return found

    def run(self, at_point: Callable[[int, Tensor | None], Tensor], linear: bool = False) -> Deviations:
        """Make the pass again, in deviations.

        Args:
            at_point: given a point's number and its basal deviation, None for none, what is handed on; both in the
                shape of its voltage.
            linear: to first order.
        """
        frame = self.frame
        moved: Deviations = [None] * len(frame.values)
        for each in self.record.program:
            if isinstance(each, Passage):
                layout = frame.layouts[each.target]
                moved[each.target] = layout.back(
                    at_point(each.index, slot_first(frame.layouts, each.source, moved[each.source]))
                )
            elif any(moved[s] is not None for s in each.inputs):
                changes = (each.tangents if linear else each.deviations)(frame, moved)
                for slot, change in zip(each.outputs, changes):
                    moved[slot] = change
        return moved

    def respond(self, driven: Sequence[Tensor]) -> RecordedDeviation:
        return RecordedDeviation(list(driven), self._driven_pass(driven), self.record, self.frame.layouts)

    def _driven_pass(self, driven: Sequence[Tensor], linear: bool = False) -> Deviations:
        return self.run(lambda i, basal: driven[i] if basal is None else basal + driven[i], linear)

    def apart(self, driven: Sequence[Tensor]) -> RecordedDeviation:
        moved: Deviations = [None] * len(self.frame.values)
        for p, site, a in zip(self.record.passages, self.record.sites, driven):
            moved[p.target] = self._layout(p).back(a)
            if site.operation is not None:
                moved[site.operation.inputs[0]] = moved[p.target]
        return RecordedDeviation(list(driven), moved, self.record, self.frame.layouts)

    # Linearised

    def linear_response(self, driven: Sequence[Tensor]) -> Tensor:
        found = self._driven_pass(driven, linear=True)[self.record.output]
        assert found is not None
        return slot_matrix(self.frame.layouts, self.record.output, found)

    def pull(
        self,
        error: Tensor,
        through: Sequence[Tensor] | None = None,
        at: RecordedDeviation | None = None,
        live: bool = False,
    ) -> list[Tensor]:
        errors = self._pulled(error, self._frame_at(at), self.record.moving, through, live)
        return [
            v.new_zeros(error.shape[0], *v.shape[1:]) if (e := errors[p.target]) is None else self._layout(p).first(e)
            for p, v in zip(self.passages, self.v)
        ]

    def output_errors(self, error: Tensor) -> list[Tensor | None]:
        errors = self._pulled(error, self.frame, self.record.tail)
        return [
            slot_first(self.frame.layouts, p.target, errors[p.target]) if count == 1 else None
            for p, count in zip(self.passages, self.somata)
        ]

    @property
    def passages(self) -> Sequence[Passage]:
        """Where each point lies."""
        return self.record.passages

    def _rows(self, at: RecordedDeviation | None = None, through: Sequence[Tensor] | None = None) -> list[Tensor]:
        """A number of outputs at a time."""
        units = torch.eye(self.outputs).to(self.output)
        found = []
        for some in units.split(max(1, ROWS_AT_ONCE // self.batch_size)):
            errors = self.pull(some.repeat_interleave(self.batch_size, dim=0), through, at)
            found.append([e.view(len(some), self.batch_size, -1) for e in self.gathered(errors)])
        return [torch.cat(each).transpose(0, 1).contiguous() for each in zip(*found)]

    def _direct_gain(self, at: RecordedDeviation | None) -> Tensor:
        return sum((j @ q for j, q in zip(self._rows(at), self.feedback)), start=self.output.new_zeros(()))

    def mean_gain(self) -> Tensor:
        few = torch.linspace(0, self.batch_size - 1, min(MEAN_OVER, self.batch_size)).round().long()
        return self.samples(few.to(self.output.device)).gain().mean(0, keepdim=True)

    # Weights alone

    @property
    def hears(self) -> Sequence[bool]:
        return [s.layer is not None and s.heard in self.record.moving for s in self.record.segments]

    def layer_weights(self) -> list[Tensor | None]:
        found = [None if s.layer is None else s.layer.arguments["weight"] for s in self.record.segments]
        return [None if w is None else constant(w, self.frame.dtype) for w in found]

    def passed_on(self, index: int, heard: Tensor) -> Tensor:
        layer, layouts = self.record.segments[index].layer, self.frame.layouts
        assert layer is not None
        moved: Deviations = [None] * len(layouts)
        moved[layer.inputs[0]] = layouts[layer.inputs[0]].back(heard)
        found = layer.deviations(self.frame, moved)[0]
        assert found is not None
        return layouts[layer.outputs[0]].first(found)

    def one_forth(self, changes: Sequence[Tensor]) -> list[Tensor]:
        moved = self.run(lambda i, basal: changes[i], linear=True)
        heard = [slot_first(self.frame.layouts, s.heard, moved[s.heard]) for s in self.record.segments]
        return [torch.zeros_like(r) if h is None else h for h, r in zip(heard, self.presynaptic)]

    def one_back(self, errors: Sequence[Tensor], through: Sequence[Tensor]) -> list[Tensor]:
        frame, record = self.frame, self.record
        starts = {
            id(s.layer): (s.layer, w, frame.layouts[s.layer.outputs[0]].back(e))
            for s, w, e, hears in zip(record.segments, through, errors, self.hears)
            if hears and s.layer is not None
        }
        found: list[Tensor | None] = [None] * len(frame.values)
        for each in reversed(record.program):
            given = [found[s] for s in each.outputs]
            if id(each) in starts:
                layer, weight, error = starts[id(each)]
                shares = layer.pulled_through(weight, frame, [error])
            elif isinstance(each, Passage) or all(e is None for e in given):
                continue
            else:
                shares = each.pulled(frame, given)
            for slot, share in zip(each.inputs, shares):
                if share is not None and slot in record.moving:
                    before = found[slot]
                    found[slot] = share if before is None else before + share
        arrived = [slot_first(frame.layouts, p.target, found[p.target]) for p in self.passages]
        return [torch.zeros_like(v) if a is None else a for a, v in zip(arrived, self.v)]

    def correlation(self, index: int, signal: Tensor, heard: Tensor) -> Tensor:
        layer, layouts = self.record.segments[index].layer, self.frame.layouts
        assert layer is not None
        weight = constant(layer.arguments["weight"], self.frame.dtype)
        given = layouts[layer.outputs[0]].back(signal), layouts[layer.inputs[0]].back(heard)
        return layer.taught(weight, False, *given)[0]

    def _output_shaped(self, error: Tensor) -> Tensor:
        """An error of the output, (B, n_L), as what made the output returned it."""
        layout = self.frame.layouts[self.record.output]
        if layout == FIRST:
            return error
        shape = self.frame.first(self.record.output).shape[1:]
        return layout.back(error.reshape(-1, *shape))

    def _frame_at(self, at: RecordedDeviation | None) -> Frame:
        frame = self.frame if at is None else self.frame.moved_by(at.moved)
        return frame if self.reach is None else replace(frame, reach=self.reach)

    def _pulled(
        self,
        error: Tensor,
        frame: Frame,
        slots: set[int],
        through: Sequence[Tensor] | None = None,
        live: bool = False,
    ) -> list[Tensor | None]:
        """Errors by slot, of ``slots`` alone: what has no part in them is not gone back to."""
        other = {id(s.layer): (s.layer, w) for s, w in zip(self.record.segments, through or ()) if s.layer is not None}
        errors: list[Tensor | None] = [None] * len(frame.values)
        errors[self.record.output] = self._output_shaped(error)
        for each in reversed(self.record.program):
            given = [errors[s] for s in each.outputs]
            if slots.isdisjoint(each.inputs) or all(e is None for e in given):
                continue
            if id(each) in other:
                layer, weight = other[id(each)]
                found = layer.pulled_through(weight, frame, given)
            else:
                found = each.pulled(frame, given, live)
            if not isinstance(each, Passage):
                for slot in each.outputs:  # no longer needed: maps are large
                    errors[slot] = None
            for slot, share in zip(each.inputs, found):
                if share is not None and slot in slots:
                    before = errors[slot]
                    errors[slot] = share if before is None else before + share
        return errors

    # From activity to updates

    def basal_drive(self, deviation: RecordedDeviation) -> list[Tensor]:
        found = []
        for passage, basal, segment in zip(self.passages, deviation.basal, self.record.segments):
            v, layout = self.frame[passage.target], self._layout(passage)
            found.append(layout.first(v + layout.back(basal) - segment.shift(v)))
        return found

    def postsynaptic(self, deviation: RecordedDeviation, plasticity: Plasticity) -> list[Tensor]:
        if plasticity == "derivative":
            return [d * a for d, a in zip(self.slopes, deviation.driven)]
        frame, found = self.frame, []
        for i, (site, passage) in enumerate(zip(self.record.sites, self.passages)):
            layout = self._layout(passage)
            signal = driven = layout.back(deviation.driven[i])
            if plasticity == "rate_difference" and not isinstance(site.phi, Identity):
                if site.operation is None:
                    at, slope = self.passages[i].target, None
                    r = site.phi(frame[at])
                else:
                    at, slope = site.operation.inputs[0], site.operation.slope(frame)
                    r = frame[site.operation.outputs[0]]
                change = deviation.moved[at]
                assert change is not None
                if deviation.late is not None:
                    change = change + layout.back(deviation.late[i])
                with_, without = (site.phi.difference(frame[at], r, d, slope) for d in (change, change - driven))
                signal = with_ - without
            if site.pool is not None:
                wins = site.pool.wins(frame)
                signal = signal * (wins != 0 if plasticity == "voltage_difference" else wins)
            found.append(layout.first(signal))
        return found

    def heard(self, deviation: RecordedDeviation) -> list[Tensor]:
        layouts = self.frame.layouts
        moved = [slot_first(layouts, s.heard, deviation.moved[s.heard]) for s in self.record.segments]
        return [r if d is None else r + d for r, d in zip(self.presynaptic, moved)]

    def gradients(
        self, signals: Sequence[Tensor], heard: Sequence[Tensor] | None = None, scale: float = 1.0
    ) -> list[list[Tensor]]:
        share, layouts = scale / self.batch_size, self.frame.layouts
        return [
            segment.gradients(self.frame, self._layout(p).back(t * share), layouts[segment.heard].back(r))
            for segment, p, t, r in zip(
                self.record.segments, self.passages, signals, self.presynaptic if heard is None else heard
            )
        ]
