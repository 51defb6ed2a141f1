"""A module under control: its control points, its feedback weights, and watching its forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from dfc_lightning.errors import require
from dfc_lightning.losses.linked_loss import LinkedLoss
from dfc_lightning.network.feedback_weights import FeedbackWeights, in_order
from dfc_lightning.network.gate import Lesson, LossReduction
from dfc_lightning.network.initial_feedback import FEEDBACK_INITS, FeedbackInit
from dfc_lightning.network.learning_rule import Direct, Layerwise, LearningRule
from dfc_lightning.network.ports import CONV_FEEDBACK, ConvFeedback, port_layout, ports_of
from dfc_lightning.network.summary import PointSummary, summarised, times
from dfc_lightning.network.unseen import unseen
from dfc_lightning.passes.chance import Chance
from dfc_lightning.passes.dense import DensePass, Layers
from dfc_lightning.passes.forward_pass import ForwardPass
from dfc_lightning.passes.recorded import RecordedPass
from dfc_lightning.recording.beside import refuse_empty
from dfc_lightning.recording.dense_chain import dense_chain
from dfc_lightning.recording.independence import check_named_modules_repeat, check_samples_are_independent
from dfc_lightning.recording.known_chain import KnownChain
from dfc_lightning.recording.own_backward import function_calls
from dfc_lightning.recording.points import ControlPoint, find_points, scope_of
from dfc_lightning.recording.reach import check_errors_come_back
from dfc_lightning.recording.recorder import Recorder, Recording
from dfc_lightning.recording.structure import Structure

AtOutput = Callable[[ForwardPass, Tensor], Tensor]
Output = Literal["first", "returned"]
OUTPUTS = ("first", "returned")

LISTED_UP_TO = 40
"""Control points that are told one by one."""


class ControlledNetwork:
    """Finds the control points of a module and owns its feedback weights, one tensor a point.

    The module itself is left as it is: hooks are on it only inside :meth:`watched`. The first forward pass seen
    there finds the points and what lies between them: a point is a use of parameters, wherever samples meet them. Dense
    layers with elementwise functions between them are a chain, with the closed forms of :class:`DensePass`; anything
    else is a :class:`RecordedPass`. The network's output r_L is the first matrix, (B, n_L), that depends on all
    parameters; what follows it, a log-softmax say, counts as part of the loss. Where there is no such matrix it is what
    the outermost module returns, maps, sequences and several heads one after the other, or what a loss is first taken
    of.

    Feedback weights are made when a rule that has some first needs them: in the first pass that it teaches, or that is
    observed.

    Args:
        module: any module, in torch's functions of tensors.
        network: name of the submodule to control; None if all trainable parameters belong to it.
        feedback_init: initial direct feedback weights, see :func:`initial_direct`; None for what the rule that first
            needs them is meant to have.
        seed: seed of random feedback weights; None to follow ``torch.manual_seed``.
        conv_feedback: feedback of convolutions, of n_L values to each unit of C maps of H × W positions:
            ``"dense"``, C·H·W·n_L weights; ``"channel"``, C·n_L weights, all positions hearing the same; ``"auto"``,
            dense up to ``DENSE_FEEDBACK_UP_TO`` weights a point.
        general: treat a chain as any other network, without its closed forms.
        extra_points: names of submodules, of any kind, whose output, as a whole, is a control point. Each returns a
            tensor, or a tuple whose first is meant, and is called once more for its update, as
            :class:`NamedSegment` says.
        output: what r_L is: ``"first"``, the first matrix that depends on all parameters; ``"returned"``, all tensors
            that the module returns and parameters have made, one after the other, as a VAE's that returns mean and
            variance beside what it decodes.

    Raises:
        ControlError: the module cannot be controlled; the message says why and what to do.
    """

    def __init__(
        self,
        module: nn.Module,
        network: str | None = None,
        feedback_init: FeedbackInit | None = None,
        seed: int | None = None,
        conv_feedback: ConvFeedback = "auto",
        general: bool = False,
        extra_points: Sequence[str] = (),
        output: Output = "first",
    ) -> None:
        known = feedback_init is None or feedback_init in FEEDBACK_INITS
        require(known, "feedback_init", feedback_init, f"choose one of {FEEDBACK_INITS}")
        require(output in OUTPUTS, "output", output, f"choose one of {OUTPUTS}")
        require(conv_feedback in CONV_FEEDBACK, "conv_feedback", conv_feedback, f"choose one of {CONV_FEEDBACK}")
        self.module = module
        self._scope = network, tuple(extra_points)
        self.conv_feedback, self.general = conv_feedback, general
        self.as_returned = output == "returned"
        self.weights = FeedbackWeights(feedback_init, torch.initial_seed() if seed is None else seed)
        self.points: list[ControlPoint] = find_points(module, *self._scope)
        self.lessons = 0
        """Forward passes taught so far: with the seed, what a rule's random draws follow from."""
        self.ranks = 0, 1
        """This process's number, and how many there are, for draws of samples."""
        self.loss: LinkedLoss | None = None
        """What the loss was found to be, where a rule asks for it; passes know it from here."""
        self.structure: Structure | None = None
        """What the forward passes have shown; None before the first."""
        self._layers = list(self.points)
        self._trainable = self._trainable_now()
        self._outputs_at: tuple[int, ...] = ()
        self._idle: list[str] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward pass."""
        return self.module(*args, **kwargs)

    def __repr__(self) -> str:
        rows = self.summary()
        lines = [f"{type(self).__name__}({type(self.module).__name__}: {len(rows)} control points"]
        for row in rows if len(rows) <= LISTED_UP_TO else ():
            voltage = f", voltage {times(row.voltage)}" if row.voltage else ""
            feedback = f", feedback {row.feedback} {times(row.shape)}" if row.shape else ""
            lines.append(f"  {row.name}: {row.type}{voltage}, {row.parameters:,} parameters{feedback}")
        weights = sum(row.feedback_weights for row in rows)
        lines.append(f"  {weights:,} feedback weights" if self.feedback else "  feedback weights not made yet")
        return "\n".join(lines) + ")"

    def summary(self) -> list[PointSummary]:
        """What is known of each control point; voltages once a pass is seen, feedback weights once they are made."""
        return summarised(self.points, self.structure, self.weights.kind, self.feedback)

    @property
    def feedback(self) -> list[nn.Parameter]:
        """The feedback weights, one a point; none before they are made."""
        return self.weights.values

    @property
    def seed(self) -> int:
        """Seed of random feedback weights."""
        return self.weights.seed

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters of all control points, in order."""
        return [p for point in self.points for p in point.parameters]

    @property
    def dtype(self) -> torch.dtype:
        """What settling is computed in: the weights' dtype, but float32 at least."""
        return torch.promote_types(self.points[0].parameters[0].dtype, torch.float32)

    @property
    def may_be_dense(self) -> bool:
        """Whether the network may be a chain of dense layers; once passes are seen, whether it is one."""
        if self.structure is not None:
            return all(chain is not None for chain in self.structure.chains.values())
        return not self.general and all(point.dense for point in self.points)

    @property
    def outputs_at(self) -> tuple[int, ...]:
        """Which points are the output; before a pass is seen, as saved with the feedback weights."""
        return self._outputs_at if self.structure is None else self.structure.outputs_at

    # Passes

    def observe(self, *args: Any, **kwargs: Any) -> ForwardPass:
        """Run the module as far as the network's output, and return the pass.

        It is bound to the feedback weights that there are; if there are none yet, direct ones are made.
        """
        return self.observing(lambda: self.module(*args, **kwargs))

    def observing(self, run: Callable[[], Any], kind: Direct | Layerwise | None = None) -> ForwardPass:
        """Call ``run``, which runs the module, and break it off at the network's output.

        Nothing after the output is run: no loss, no logging. The module stays as it is, in buffers and attributes:
        the running statistics of a normalisation are those of the training steps.

        Args:
            run: runs the module.
            kind: the feedback weights to bind the pass to; see :meth:`bound`.
        """

        def stop(forward: ForwardPass, output: Tensor) -> Tensor:
            raise _OutputReached(self.bound(forward, kind))

        try:
            # With gradients, as in training: what a module does beside its pass without them is told from it by that.
            with unseen(self.module), torch.enable_grad(), self.watched(stop):
                run()
        except _OutputReached as reached:
            return reached.forward
        raise AssertionError("watched() lets no forward pass end without reaching the output")

    @contextlib.contextmanager
    def taught_by(self, rule: LearningRule, loss_reduction: LossReduction = "mean") -> Iterator[Lesson]:
        """Run one forward pass inside; ``loss.backward()`` then leaves the rule's update in ``.grad``.

        Args:
            rule: the learning rule that teaches.
            loss_reduction: ``"mean"`` if the loss is a mean over the batch, ``"sum"`` if it is a sum.

        Yields:
            The lesson; see :meth:`Lesson.watch` for losses that are scaled before ``backward``.

        Example:
            >>> mlp = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
            >>> net = ControlledNetwork(mlp)
            >>> from dfc_lightning.rules import DFC
            >>> with net.taught_by(DFC(target_stepsize=0.1)):
            ...     loss = nn.functional.cross_entropy(net(torch.randn(4, 3)), torch.tensor([0, 1, 1, 0]))
            >>> loss.backward()
            >>> mlp[0].weight.grad.shape
            torch.Size([5, 3])
        """
        lesson = Lesson(rule, loss_reduction)

        def open_lesson(forward: ForwardPass, output: Tensor) -> Tensor:
            if rule.feedback is not None:
                forward = self.bound(forward, rule.feedback)
            chance = Chance(self.seed, self.lessons, *self.ranks, forward.output.device)
            forward, self.lessons = forward.with_chance(chance).with_loss(self.loss), self.lessons + 1
            return lesson.open(forward, self.points, output)

        with self.watched(open_lesson):
            yield lesson

    def jacobian(self, *args: Any, **kwargs: Any) -> Tensor:
        """J = ∂r_L/∂[v_1 … v_L] of each sample, (B, n_L, Σ n_i)."""
        return torch.cat(self.observe(*args, **kwargs).jacobians(), dim=2)

    @contextlib.contextmanager
    def watched(self, at_output: AtOutput) -> Iterator[None]:
        """Watch one forward pass; inside, no error can travel from one layer to the one before.

        Args:
            at_output: called with the pass and the network's output once all control points have been passed; what it
                returns takes the output's place.

        Raises:
            ControlError: a layer is passed twice or not at all, or its output is lost on the way.
        """
        self._follow_what_learns()
        watch = self._watch(at_output)
        with contextlib.ExitStack() as stack:
            stack.callback(watch.close)
            found = self._layers if isinstance(watch, Recorder) else self.points
            for k, layer in enumerate({id(p.layer): p.layer for p in found}.values()):
                if isinstance(watch, Recorder) or k == 0:
                    stack.callback(layer.register_forward_pre_hook(watch.before, with_kwargs=True).remove)
                stack.callback(layer.register_forward_hook(watch.passed, with_kwargs=True).remove)
            if isinstance(watch, Recorder):
                stack.enter_context(function_calls(watch.tape.note))
                for module in self._around():
                    stack.callback(module.register_forward_pre_hook(watch.arriving, with_kwargs=True).remove)
                    stack.callback(module.register_forward_hook(watch.returning, with_kwargs=True).remove)
                stack.enter_context(watch.tape)
            yield
            watch.check_complete()

    def _around(self) -> list[nn.Module]:
        """The modules that layers are in."""
        names = [p.name.split(".") for p in self._layers]
        return [
            self.module.get_submodule(name)
            for name in dict.fromkeys(".".join(name[:k]) for name in names for k in range(len(name)))
        ]

    def _trainable_now(self) -> list[bool]:
        return [p.requires_grad for p in scope_of(self.module, self._scope[0])[0].parameters()]

    def _follow_what_learns(self) -> None:
        """Find the points anew where layers were frozen or unfrozen; feedback weights of the others are kept."""
        trainable = self._trainable_now()
        if trainable == self._trainable:
            return
        self.weights.set_aside(self.points)
        self.points = find_points(self.module, *self._scope)
        self._layers, self._trainable = list(self.points), trainable
        self.structure, self._idle = None, []

    def _watch(self, at_output: AtOutput) -> KnownChain | Recorder:
        links = None if self.structure is None else self.structure.chains.get(self.module.training)
        if links is not None:
            phis = [link.nonlinearity for link in links]
            return KnownChain(self.points, links, lambda x, v, output: at_output(self._dense(phis, x, v), output))

        def recorded(recording: Recording, output: Tensor) -> Tensor:
            return at_output(self._see(recording), output)

        return Recorder(self._layers, recorded, self.dtype, self.module.buffers(), self.as_returned, self._idle)

    def _see(self, recording: Recording) -> ForwardPass:
        """The recorded pass; what it shows of the network is taken over, or must be as before."""
        record, frame, points, bare, self._idle = recording
        names, training = [p.name for p in points], self.module.training
        structure = self.structure
        if structure is not None:
            structure.check(names, recording.shapes)
        if structure is None or training not in structure.chains:
            refuse_empty(names[0], frame[record.segments[0].heard])
            with torch.no_grad(), torch.autocast(frame[record.output].device.type, enabled=False):
                check_samples_are_independent(record, frame)
                check_named_modules_repeat(record, frame)
                check_errors_come_back(record, frame, names)
                chain = dense_chain(record, frame) if bare and not self.general else None
            self.structure = structure = (structure or self._first(recording)).with_mode(training, chain)
        links = structure.chains[training]
        if links is None:
            return RecordedPass(record, frame, structure.ports)
        heard = [frame[s.heard] for s in record.segments]
        return self._dense([link.nonlinearity for link in links], heard, [frame[p.target] for p in record.passages])

    def _first(self, recording: Recording) -> Structure:
        record, frame, points, *_ = recording
        outputs, shapes = frame.first(record.output)[0].numel(), tuple(recording.shapes)
        if self.feedback:  # loaded before
            self.weights.reorder(self.points, points)
        if self.feedback and isinstance(self.weights.kind, Direct):
            ports = ports_of(points, shapes, outputs, self.feedback)
        else:
            ports = port_layout(points, shapes, outputs, self.conv_feedback)
        self.points = points
        at = tuple(i for i, count in enumerate(record.somata) if count == 1)
        return Structure(tuple(points), shapes, ports, outputs, at)

    def _dense(self, nonlinearities: Sequence[Any], heard: list[Tensor], voltages: list[Tensor]) -> DensePass:
        linear = [cast(nn.Linear, p.layer) for p in self.points]
        layers = Layers([layer.weight for layer in linear], [layer.bias for layer in linear], nonlinearities)
        if voltages[0].dtype == self.dtype:
            return DensePass(layers, (), heard[0], voltages, [*heard[1:], voltages[-1]])
        with torch.no_grad(), torch.autocast(heard[0].device.type, enabled=False):
            return DensePass.run(heard[0].to(self.dtype), layers)  # after autocast, to settle from full precision

    # Feedback weights

    def bound(self, forward: ForwardPass, kind: Direct | Layerwise | None = None) -> ForwardPass:
        """The pass bound to the network's feedback weights as they are now, made if there are none yet.

        Args:
            forward: a pass of this network.
            kind: what feedback weights are needed; None for those that there are.
        """
        return self.weights.bind(forward, self.points, kind).with_loss(self.loss)

    def state_dict(self) -> dict[str, Tensor]:
        """The feedback weights by the names of their layers; none before they are made."""
        return {point.name: q.detach().clone() for point, q in zip(self.points, self.feedback)}

    def load_state_dict(
        self,
        state: Mapping[str, Tensor],
        kind: Direct | Layerwise | None = None,
        outputs_at: Sequence[int] | None = None,
    ) -> None:
        """Take over feedback weights saved by :meth:`state_dict`.

        Args:
            state: the feedback weights.
            kind: what feedback weights they are; None for direct ones.
            outputs_at: which of the points are the output; None for the last.

        Raises:
            ControlError: they belong to another network; nothing is changed then.
        """
        if len(state) == 0 and not self.feedback:
            return
        kind = kind or self.weights.kind or Direct()
        shapes = [tuple(q.shape) for q in self.feedback] if self.feedback and self.structure is not None else None
        points = self.points if self.structure is None else list(self.structure.points)
        self.points = in_order(state, points, kind, shapes)
        self.weights.load(state, kind, self.points, self.dtype)
        self._outputs_at = (len(self.points) - 1,) if outputs_at is None else tuple(outputs_at)


class _OutputReached(BaseException):
    """Carries the pass out of a module's run that is broken off at the network's output.

    No ``Exception``, so that an ``except`` clause of the user's around the forward pass lets it through.
    """

    def __init__(self, forward: ForwardPass) -> None:
        super().__init__()
        self.forward = forward
