"""Any network under control: convolutions, branches, residual sums and normalisation between the control points.

The operations of a forward pass are made again, in deviations from that pass, with Q_i u added at each control point.
A point's voltage v_i is the output of a linear or convolutional layer, or of the normalisation that follows it
directly, so that no teaching signal has to travel back through another layer's weights to reach a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from dfc_lightning.control.batch_norm import BatchNorm, Live
from dfc_lightning.control.layered import Layered
from dfc_lightning.control.nonlinearity import Identity
from dfc_lightning.control.operations import Deviations, Frame
from dfc_lightning.control.plasticity import Plasticity
from dfc_lightning.control.tape import Passage
from dfc_lightning.control.wiring import GraphActivity, GraphResponse

MEAN_OVER = 8
"""Samples that the batch-mean Jacobian product is taken from."""

ROWS_AT_ONCE = 512
"""Rows of Jacobians that ride through the network together."""


class Graph:
    """The feedback weights of any network, and what its control does to it.

    Args:
        feedback: Q_i, (n_i, n_L), for the n_i units of a point, or for its channels alone.
        shapes: shape of each point's voltage, without the samples.
        spreads: shape of each point's port: that of the voltage, or with ones where all positions hear the same.
    """

    reducible = False

    def __init__(
        self, feedback: Sequence[Tensor], shapes: Sequence[Sequence[int]], spreads: Sequence[Sequence[int]]
    ) -> None:
        self.feedback = list(feedback)
        self.shapes, self.spreads = [tuple(s) for s in shapes], [tuple(s) for s in spreads]
        self.widths = [q.shape[0] for q in self.feedback]
        self.outputs = self.feedback[-1].shape[1]

    @property
    def depth(self) -> int:
        """The number of control points, L."""
        return len(self.feedback)

    def repeat(self, activity: GraphActivity) -> GraphActivity:
        """The feedforward pass of the same input with the weights as they are now, and the same batch statistics."""
        return GraphActivity(activity.wiring, activity.wiring.again(activity.frame))

    def layered(self, activity: GraphActivity) -> Layered:
        """The points as layers of a chain, for feedback learning."""
        return Layered(self, activity)

    def made_of(self, activity: GraphActivity) -> list[Tensor]:
        """The tensors that an update is made of."""
        parameters = (p for segment in activity.wiring.segments for p in segment.parameters)
        return [*activity.presynaptic(), *activity.v, *parameters]

    @cached_property
    def stacked_feedback(self) -> Tensor:
        """All Q_i one above the other, (Σ n_i, n_L)."""
        return torch.cat(self.feedback)

    def apical(self, u: Tensor) -> list[Tensor]:
        """What Q_i u makes of a control signal ``u``, (B, n_L): one (B, n_i) a point."""
        return [u @ q.T for q in self.feedback]

    def spread(self, ports: Sequence[Tensor]) -> list[Tensor]:
        """Apical voltages in the shape of the points' voltages."""
        return [a.reshape(-1, *spread).expand(-1, *shape) for a, spread, shape in zip(ports, self.spreads, self.shapes)]

    # Under control

    def run(
        self, activity: GraphActivity, at_point: Callable[[int, Tensor | None], Tensor], linear: bool = False
    ) -> Deviations:
        """Make the pass again, in deviations.

        Args:
            activity: the feedforward pass.
            at_point: given a point's number and its basal deviation, None for none, what is handed on.
            linear: to first order.
        """
        frame = activity.frame
        moved: Deviations = [None] * len(frame.values)
        for each in activity.wiring.program:
            if isinstance(each, Passage):
                moved[each.target] = at_point(each.index, moved[each.source])
            elif any(moved[s] is not None for s in each.inputs):
                changes = (each.tangents if linear else each.deviations)(frame, moved)
                for slot, change in zip(each.outputs, changes):
                    moved[slot] = change
        return moved

    def respond(self, activity: GraphActivity, apical: Sequence[Tensor]) -> GraphResponse:
        """The controlled feedforward pass: every point is driven by its apical compartment too."""
        driven = self.spread(apical)
        return GraphResponse(list(apical), driven, self._driven_pass(activity, driven), activity.wiring)

    def _driven_pass(self, activity: GraphActivity, driven: Sequence[Tensor], linear: bool = False) -> Deviations:
        return self.run(activity, lambda i, basal: driven[i] if basal is None else basal + driven[i], linear)

    def apart(self, activity: GraphActivity, apical: Sequence[Tensor]) -> GraphResponse:
        """What apical voltages do to each point alone, what it hears staying feedforward."""
        driven = self.spread(apical)
        moved: Deviations = [None] * len(activity.frame.values)
        for p, site, a in zip(activity.wiring.passages, activity.wiring.sites, driven):
            moved[p.target] = a
            if site.operation is not None:
                moved[site.operation.inputs[0]] = a
        return GraphResponse(list(apical), driven, moved, activity.wiring)

    # Linearised

    def linear_response(self, activity: GraphActivity, apical: Sequence[Tensor]) -> Tensor:
        """First-order output deviation Σ_i J_i a_i, (B, n_L)."""
        found = self._driven_pass(activity, self.spread(apical), linear=True)[activity.wiring.output]
        assert found is not None
        return found

    def errors(self, activity: GraphActivity, output_error: Tensor, live: bool = False) -> list[Tensor]:
        """Backpropagated errors J_iᵀ e of an output error e, (B, n_L): one (B, n_i) a point.

        Args:
            activity: the feedforward pass.
            output_error: e.
            live: let batch statistics follow their batch, as backprop does; else they are held.
        """
        return self._pull(activity, live)(output_error)

    def jacobians(self, activity: GraphActivity) -> list[Tensor]:
        """J_i = ∂r_L/∂v_i, one (B, n_L, n_i) a point."""
        pull = self._pull(activity)
        rows = [
            pull(e.expand(activity.batch_size, -1))
            for e in torch.eye(self.outputs, dtype=activity.output.dtype, device=activity.output.device)
        ]
        return [torch.stack(each, dim=1) for each in zip(*rows)]

    def output_gain(self, activity: GraphActivity, response: GraphResponse | None = None) -> Tensor:
        """JQ = Σ_i J_i Q_i, (B, n_L, n_L), at the feedforward state or that of a response."""
        batch, n = activity.batch_size, self.outputs
        found = []
        for rows in torch.arange(batch * n, device=activity.output.device).split(ROWS_AT_ONCE):
            index = rows // n
            part = activity.samples(index)
            at = None if response is None else [p[index] for p in response.ports]
            errors = self._pull(part, at=at)(torch.eye(n).to(activity.output)[rows % n])
            found.append(sum((e @ q for e, q in zip(errors, self.feedback)), start=errors[0].new_zeros(())))
        return torch.cat(found).view(batch, n, n)

    def mean_gain(self, activity: GraphActivity) -> Tensor:
        """The mean of JQ over ``MEAN_OVER`` samples of the batch, (1, n_L, n_L)."""
        few = torch.linspace(0, activity.batch_size - 1, min(MEAN_OVER, activity.batch_size)).round().long()
        return self.output_gain(activity.samples(few.to(activity.output.device))).mean(0, keepdim=True)

    def _pull(
        self, activity: GraphActivity, live: bool = False, at: Sequence[Tensor] | None = None
    ) -> Callable[[Tensor], list[Tensor]]:
        """The map from output errors to the points', once linearised."""
        with torch.enable_grad():
            start = at or [activity.output.new_zeros(activity.batch_size, n) for n in self.widths]
            leaves = [a.detach().requires_grad_() for a in start]
            output = self._replay(activity, leaves, live)

        def pull(error: Tensor) -> list[Tensor]:
            found = torch.autograd.grad(output, leaves, error, retain_graph=True, allow_unused=True)
            return [torch.zeros_like(a) if g is None else g for g, a in zip(found, leaves)]

        return pull

    def _replay(self, activity: GraphActivity, ports: Sequence[Tensor], live: bool = False) -> Tensor:
        """The output with ``ports`` added at the points, in plain values."""
        frame = Frame(list(activity.frame.values), activity.batch_size, activity.frame.dtype)
        driven = self.spread(ports)
        for each in activity.wiring.program:
            if isinstance(each, Passage):
                frame.values[each.target] = frame[each.source] + driven[each.index]
                continue
            made = Live(each) if live and isinstance(each, BatchNorm) else each
            for slot, value in zip(each.outputs, made.values(frame)):
                frame.values[slot] = value
        return frame[activity.wiring.output]

    # From activity to updates

    def postsynaptic(self, activity: GraphActivity, response: GraphResponse, plasticity: Plasticity) -> list[Tensor]:
        """What the feedback changed in each point, in the shape of its voltage; see :data:`Plasticity`."""
        if plasticity == "derivative":
            return [d * a for d, a in zip(activity.slopes, response.driven)]
        frame, found = activity.frame, []
        for i, (site, driven) in enumerate(zip(activity.wiring.sites, response.driven)):
            signal = driven
            if plasticity == "rate_difference" and not isinstance(site.phi, Identity):
                if site.operation is None:
                    at, slope = activity.wiring.passages[i].target, None
                    r = site.phi(frame[at])
                else:
                    at, slope = site.operation.inputs[0], site.operation.slope(frame)
                    r = frame[site.operation.outputs[0]]
                change = response.moved[at]
                assert change is not None
                if response.late is not None:
                    change = change + response.late[i]
                with_, without = (site.phi.difference(frame[at], r, d, slope) for d in (change, change - driven))
                signal = with_ - without
            found.append(signal if site.pool is None else signal * site.pool.wins(frame))
        return found

    def presynaptic(self, activity: GraphActivity, response: GraphResponse) -> list[Tensor]:
        """What each layer multiplies with its weights while the network is controlled."""
        moved = [response.moved[s.heard] for s in activity.wiring.segments]
        return [r if d is None else r + d for r, d in zip(activity.presynaptic(), moved)]

    def update(
        self, activity: GraphActivity, signals: Sequence[Tensor], heard: Sequence[Tensor], scale: float
    ) -> list[list[Tensor]]:
        """``scale`` times what each parameter is taught by signals t_i in the shape of the voltages.

        Weights and biases by t_i and what the layer has heard; those of a normalisation by its local derivative at
        the feedforward state.
        """
        return [
            segment.gradients(activity.frame, t * scale, r)
            for segment, t, r in zip(activity.wiring.segments, signals, heard)
        ]
