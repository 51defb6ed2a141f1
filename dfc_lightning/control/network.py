"""A module under control: its control points, its feedback weights, and watching its forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from dfc_lightning.autograd import Lesson, LossReduction, Rule
from dfc_lightning.control.chain import Activity, Chain
from dfc_lightning.control.chain_watch import ChainWatch, FirstWatch
from dfc_lightning.control.checks import ControlError, require
from dfc_lightning.control.evaluator import Evaluator
from dfc_lightning.control.feedback import (
    FEEDBACK_INITS,
    FeedbackInit,
    averaged_pseudoinverse,
    initial_feedback,
)
from dfc_lightning.control.graph import Graph
from dfc_lightning.control.graph_feedback import (
    CONV_FEEDBACK,
    ConvFeedback,
    check_samples_are_independent,
    initial_graph_feedback,
    port_shapes,
)
from dfc_lightning.control.kept import matched
from dfc_lightning.control.nonlinearity import Identity, Nonlinearity
from dfc_lightning.control.operations import constant
from dfc_lightning.control.points import ControlPoint, find_points, scope_of
from dfc_lightning.control.unseen import unseen
from dfc_lightning.control.watch import GraphWatch
from dfc_lightning.control.wiring import GraphActivity

AtOutput = Callable[["Activity | GraphActivity", Tensor], Tensor]
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


class ControlledNetwork:
    """Finds the control points of a module and owns the feedback weights Q_i, one (n_i, n_L) tensor a point.

    The module itself is left as it is: hooks are on it only inside :meth:`watched`. The first forward pass seen
    there finds the order of the layers and what lies between them. Dense layers with elementwise functions between
    them are a :class:`Chain`, with the closed forms of that; anything else is a :class:`Graph`. The network's output
    r_L is the first matrix, (B, n_L), that depends on all layers; what follows it, a log-softmax say, counts as part
    of the loss.

    Args:
        module: any module whose trainable parameters are those of linear and convolutional layers and of
            normalisations.
        network: name of the submodule to control; None if all trainable parameters belong to it.
        feedback_init: initial feedback weights, see :func:`initial_feedback` and :func:`initial_graph_feedback`.
        seed: seed of random feedback weights; None to follow ``torch.manual_seed``.
        conv_feedback: feedback of convolutions, of n_L values to each unit of C maps of H × W positions:
            ``"dense"``, C·H·W·n_L weights; ``"channel"``, C·n_L weights, all positions hearing the same; ``"auto"``,
            dense up to ``DENSE_FEEDBACK_UP_TO`` weights a point.
        general: treat a chain as any other network, without its closed forms.
        extra_points: names of submodules of other kinds whose output, as a whole, is a control point too. Each is
            called with one tensor, and once more for its update, as :class:`NamedSegment` says.

    Raises:
        ControlError: the module cannot be controlled; the message says why and what to do.
    """

    def __init__(
        self,
        module: nn.Module,
        network: str | None = None,
        feedback_init: FeedbackInit = "weight_product",
        seed: int | None = None,
        conv_feedback: ConvFeedback = "auto",
        general: bool = False,
        extra_points: Sequence[str] = (),
    ) -> None:
        require(feedback_init in FEEDBACK_INITS, "feedback_init", feedback_init, f"choose one of {FEEDBACK_INITS}")
        require(conv_feedback in CONV_FEEDBACK, "conv_feedback", conv_feedback, f"choose one of {CONV_FEEDBACK}")
        self.module = module
        self._layers = find_points(module, network, extra_points)
        self.points: list[ControlPoint] = list(self._layers)
        self.feedback_init, self.conv_feedback = feedback_init, conv_feedback
        self.seed = torch.initial_seed() if seed is None else seed
        self.feedback: list[nn.Parameter] = []
        self.average: Callable[[Tensor], Tensor] = lambda tensor: tensor
        """The mean of a tensor over processes, for feedback weights that start from activity."""
        self._seen: set[bool] = set()  # in training mode, in evaluation mode
        self._loaded = False  # whether the feedback weights are from elsewhere, not to be set by activity
        self._shapes: list[tuple[int, ...]] = []
        drops = any(isinstance(m, _DROPOUT) and m.p > 0 for m in scope_of(module, network)[0].modules())
        self.is_graph = general or drops or not all(point.dense for point in self.points)
        if not self.is_graph:
            self._initialise_feedback()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward pass."""
        return self.module(*args, **kwargs)

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters of all control points, in order."""
        return [p for point in self.points for p in point.parameters]

    def chain(self) -> Chain | Graph:
        """The network as it is now, detached, in float32 or better; known once a forward pass has been seen."""
        if not self._seen:
            raise ControlError("The nonlinearities are not known yet: run a batch with observe() first.")
        dtype = self.dtype
        for point, q in zip(self.points, self.feedback):
            q.data = q.data.to(point.parameters[0].device, dtype)
        feedback = [q.detach() for q in self.feedback]
        if self.is_graph:
            return Graph(feedback, self._shapes, port_shapes(self.points, self._shapes, feedback))
        layers = [cast(nn.Linear, p.layer) for p in self.points]
        return Chain(
            [constant(layer.weight, dtype) for layer in layers],
            [None if layer.bias is None else constant(layer.bias, dtype) for layer in layers],
            [p.nonlinearity or Identity() for p in self.points],
            feedback,
        )

    @property
    def dtype(self) -> torch.dtype:
        """What settling is computed in: the weights' dtype, but float32 at least."""
        return torch.promote_types(self.points[0].parameters[0].dtype, torch.float32)

    def observe(self, *args: Any, **kwargs: Any) -> Activity | GraphActivity:
        """Run the module as far as the network's output, without gradients, and return the activity."""
        with torch.no_grad():
            return self.observing(lambda: self.module(*args, **kwargs))

    def observing(self, run: Callable[[], Any]) -> Activity | GraphActivity:
        """Call ``run``, which runs the module, and break it off at the network's output.

        Nothing after the output is run: no loss, no logging. The module stays as it is, in buffers and attributes:
        the running statistics of a normalisation are those of the training steps.
        """

        def stop(activity: Activity | GraphActivity, output: Tensor) -> Tensor:
            raise _OutputReached(activity)

        try:
            with unseen(self.module), self.watched(stop):
                run()
        except _OutputReached as reached:
            return reached.activity
        raise AssertionError("watched() lets no forward pass end without reaching the output")

    @contextlib.contextmanager
    def taught_by(self, rule: Rule, loss_reduction: LossReduction = "mean") -> Iterator[Lesson]:
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

        def open_lesson(activity: Activity | GraphActivity, output: Tensor) -> Tensor:
            return lesson.open(activity, self.chain(), self.points, output)

        with self.watched(open_lesson):
            yield lesson

    def jacobian(self, *args: Any, **kwargs: Any) -> Tensor:
        """J = ∂r_L/∂[v_1 … v_L] of each sample, (B, n_L, Σ n_i)."""
        activity = self.observe(*args, **kwargs)  # by which a network is known
        chain: Evaluator = self.chain()
        return torch.cat(chain.jacobians(activity), dim=2)

    @contextlib.contextmanager
    def watched(self, at_output: AtOutput) -> Iterator[None]:
        """Watch one forward pass; inside, no error can travel from one layer to the one before.

        Args:
            at_output: called with the activity and the network's output once all control points have been passed;
                what it returns takes the output's place.

        Raises:
            ControlError: a layer is passed twice or not at all, or its output is lost on the way.
        """
        watch = self._watch(at_output)
        with contextlib.ExitStack() as stack:
            if isinstance(watch, GraphWatch):
                stack.callback(watch.close)
            for point in self._layers:
                if isinstance(watch, GraphWatch):
                    hook = point.layer.register_forward_pre_hook(watch.before, with_kwargs=True)
                    stack.callback(hook.remove)
                hook = point.layer.register_forward_hook(watch.passed, with_kwargs=True)
                stack.callback(hook.remove)
            for mode in watch.modes:
                stack.enter_context(mode)
            yield
        watch.check_complete()

    def _watch(self, at_output: AtOutput) -> ChainWatch | GraphWatch:
        if self.is_graph:

            def graph_seen(activity: GraphActivity, order: list[ControlPoint], output: Tensor) -> Tensor:
                self._recognise(activity, order)
                return at_output(activity, output)

            return GraphWatch(self._layers, graph_seen, self.dtype, self.module.buffers())
        if not self._seen:

            def first_seen(
                watch: FirstWatch,
                activity: GraphActivity,
                order: list[ControlPoint],
                found: list[tuple[Nonlinearity, bool]] | None,
                output: Tensor,
            ) -> Tensor:
                if found is None:
                    self.is_graph = True
                    if not self._loaded:
                        self.feedback = []
                    self._recognise(activity, order)
                    return at_output(activity, output)
                self._settle_order(order, found)
                return at_output(self._activity(watch.inputs, watch.voltages, adopt=True), output)

            return FirstWatch(self._layers, first_seen, self.dtype, self.module.buffers())

        check = self.module.training not in self._seen

        def chain_seen(
            inputs: list[Tensor], voltages: list[Tensor], found: list[tuple[Nonlinearity, bool]], output: Tensor
        ) -> Tensor:
            if check:
                self._settle_order(self.points, found)
            return at_output(self._activity(inputs, voltages), output)

        return ChainWatch(self.points, chain_seen, check)

    def _settle_order(self, order: list[ControlPoint], found: list[tuple[Nonlinearity, bool]]) -> None:
        """Take over what a forward pass has shown: the layers' order and nonlinearities."""
        for point, (nonlinearity, overwrites) in zip(order, found):
            point.nonlinearity, point.overwrites = nonlinearity, overwrites
        reordered = [p.name for p in order] != [p.name for p in self.points]
        self.points = order
        self._seen.add(self.module.training)
        if reordered:
            self._initialise_feedback()

    def _activity(self, inputs: list[Tensor], voltages: list[Tensor], adopt: bool = False) -> Activity:
        chain, dtype = self.chain(), self.dtype
        assert isinstance(chain, Chain)
        with torch.no_grad(), torch.autocast(inputs[0].device.type, enabled=False):
            if voltages[0].dtype != dtype:  # autocast: settle from a feedforward pass in full precision
                activity = chain.feedforward(inputs[0].to(dtype))
            else:
                activity = Activity(inputs[0], voltages, [*inputs[1:], voltages[-1]], chain.nonlinearities)
            if adopt and self.feedback_init == "jacobian":
                self._adopt([self.average(q) for q in averaged_pseudoinverse(chain, activity)])
        return activity

    def _adopt(self, values: list[Tensor]) -> None:
        """Take feedback weights from activity."""
        self.feedback = [nn.Parameter(q) for q in values]
        self.feedback_init = "weight_product"  # values are given now: none to be taken from activity

    def _recognise(self, activity: GraphActivity, order: list[ControlPoint]) -> None:
        """Take over what the first forward pass of a graph has shown, or see that a later one is like it."""
        shapes = [tuple(v.shape[1:]) for v in activity.v]
        names = [p.name for p in order]
        if self._shapes and (shapes != self._shapes or names != [p.name for p in self.points]):
            raise ControlError(
                f"The layers {names} with voltages of the shapes {shapes} were run in this step, but "
                f"{[p.name for p in self.points]} with {self._shapes} in the first one. Feedback control needs the "
                "same layers in the same order, and inputs of the same shape, in every step."
            )
        if self.module.training not in self._seen:
            with torch.no_grad(), torch.autocast(activity.output.device.type, enabled=False):
                check_samples_are_independent(activity)
        if not self._shapes:
            loaded = {p.name: q for p, q in zip(self.points, self.feedback)}
            self.points, self._shapes = order, shapes
            outputs = activity.output.shape[1]
            if loaded:
                self.feedback = [loaded[name] for name in names]
                port_shapes(order, shapes, [q.detach() for q in self.feedback], outputs)  # raises if they do not fit
            else:
                with torch.no_grad(), torch.autocast(activity.output.device.type, enabled=False):
                    values = initial_graph_feedback(
                        self.feedback_init,
                        order,
                        activity,
                        self.conv_feedback,
                        torch.Generator().manual_seed(self.seed),
                    )
                self._adopt([self.average(q) for q in values])
        self._seen.add(self.module.training)

    def state_dict(self) -> dict[str, Tensor]:
        """The feedback weights by the names of their layers; none before the first forward pass, which may set them."""
        if not (self._seen or self._loaded):
            return {}
        return {point.name: q.detach().clone() for point, q in zip(self.points, self.feedback)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over feedback weights saved by :meth:`state_dict`.

        Raises:
            ControlError: they belong to another network; nothing is changed then.
        """
        if len(state) == 0 and not self._seen:
            return
        shapes = [tuple(q.shape) for q in self.feedback] if self._seen else None
        order, is_graph = matched(state, self.points, self.is_graph, shapes)
        self.points, self.is_graph, self._loaded = order, is_graph, True
        self.feedback = [nn.Parameter(state[p.name].to(p.parameters[0].device, self.dtype)) for p in order]
        if self.feedback_init == "jacobian":
            self.feedback_init = "weight_product"  # values are given: none to be taken from activity

    def _initialise_feedback(self) -> None:
        weights = [constant(p.parameters[0], self.dtype) for p in self.points]
        if any(after.shape[1] != w.shape[0] for w, after in pairwise(weights)):
            # Registered in another order than they are called: the first forward pass brings this up again.
            values = [w.new_zeros(w.shape[0], weights[-1].shape[0]) for w in weights]
        else:
            values = initial_feedback(self.feedback_init, weights, torch.Generator().manual_seed(self.seed))
        self.feedback = [nn.Parameter(q) for q in values]


class _OutputReached(BaseException):
    """Carries the activity out of a forward pass that is broken off at the network's output.

    No ``Exception``, so that an ``except`` clause of the user's around the forward pass lets it through.
    """

    def __init__(self, activity: Activity | GraphActivity) -> None:
        super().__init__()
        self.activity = activity
