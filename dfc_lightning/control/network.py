"""A module under control: its control points, its feedback weights, and watching its forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dfc_lightning.autograd import Lesson, LossReduction, Rule
from dfc_lightning.control.chain import Activity, Chain
from dfc_lightning.control.checks import ControlError, require
from dfc_lightning.control.feedback import (
    FEEDBACK_INITS,
    FeedbackInit,
    averaged_pseudoinverse,
    initial_feedback,
)
from dfc_lightning.control.nonlinearity import Identity, Nonlinearity
from dfc_lightning.control.points import ControlPoint, find_points
from dfc_lightning.control.trace import OperationRecorder


class ControlledNetwork:
    """Finds the control points of a module and owns the feedback weights Q_i, one (n_i, n_L) tensor a point.

    The module itself is left as it is: hooks are on it only inside :meth:`watched`. The first forward pass seen
    there fixes the order of the layers and the nonlinearities between them; the first in training mode and the first
    in evaluation mode are checked. What follows the last layer, a log-softmax say, counts as part of the loss: the
    network's output r_L is that layer's voltage.

    Args:
        module: any module whose trainable layers are a chain of ``nn.Linear`` with elementwise functions between.
        network: name of the submodule that is the chain; None if all trainable parameters belong to it.
        feedback_init: initial feedback weights, see :func:`initial_feedback`.
        seed: seed of random feedback weights; None to follow ``torch.manual_seed``.

    Raises:
        ControlError: the module cannot be controlled; the message says why and what to do.
    """

    def __init__(
        self,
        module: nn.Module,
        network: str | None = None,
        feedback_init: FeedbackInit = "weight_product",
        seed: int | None = None,
    ) -> None:
        require(feedback_init in FEEDBACK_INITS, "feedback_init", feedback_init, f"choose one of {FEEDBACK_INITS}")
        self.module = module
        self.points: list[ControlPoint] = find_points(module, network)
        self.feedback_init = feedback_init
        self.seed = torch.initial_seed() if seed is None else seed
        self.feedback: list[nn.Parameter] = []
        self._seen: set[bool] = set()  # in training mode, in evaluation mode
        self._initialise_feedback()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward pass."""
        return self.module(*args, **kwargs)

    @property
    def parameters(self) -> list[Tensor]:
        """Weights and biases of all control points, in order."""
        return [p for point in self.points for p in point.parameters]

    def chain(self) -> Chain:
        """The chain as it is now, detached, in float32 or better; known once a forward pass has been seen."""
        if not self._seen:
            raise ControlError("The nonlinearities are not known yet: run a batch with observe() first.")
        dtype = self.dtype
        for point, q in zip(self.points, self.feedback):
            q.data = q.data.to(point.layer.weight.device, dtype)
        return Chain(
            [p.layer.weight.detach().to(dtype) for p in self.points],
            [None if p.layer.bias is None else p.layer.bias.detach().to(dtype) for p in self.points],
            [p.nonlinearity or Identity() for p in self.points],
            [q.detach() for q in self.feedback],
        )

    @property
    def dtype(self) -> torch.dtype:
        """What settling is computed in: the weights' dtype, but float32 at least."""
        return torch.promote_types(self.points[0].layer.weight.dtype, torch.float32)

    def observe(self, *args: Any, **kwargs: Any) -> Activity:
        """Run the module as far as the network's output, without gradients, and return the activity."""
        with torch.no_grad():
            return self.observing(lambda: self.module(*args, **kwargs))

    def observing(self, run: Callable[[], Any]) -> Activity:
        """Call ``run``, which runs the module, and break it off at the network's output.

        Nothing after the output is run: no loss, no logging.
        """

        def stop(activity: Activity, output: Tensor) -> Tensor:
            raise _OutputReached(activity)

        try:
            with self.watched(stop):
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

        def open_lesson(activity: Activity, output: Tensor) -> Tensor:
            return lesson.open(activity, self.chain(), self.points, output)

        with self.watched(open_lesson):
            yield lesson

    def jacobian(self, *args: Any, **kwargs: Any) -> Tensor:
        """J = ∂r_L/∂[v_1 … v_L] of each sample, (B, n_L, Σ n_i)."""
        activity = self.observe(*args, **kwargs)
        return torch.cat(self.chain().jacobians(activity.slopes), dim=2)

    @contextlib.contextmanager
    def watched(self, at_output: Callable[[Activity, Tensor], Tensor]) -> Iterator[None]:
        """Watch one forward pass; inside, no error can travel from one layer to the one before.

        Args:
            at_output: called with the activity and the last layer's output once all control points have been
                passed; what it returns takes the output's place.

        Raises:
            ControlError: a layer is passed twice or not at all, or what lies between two is not elementwise.
        """
        watch = _Watch(self, at_output, None if self.module.training in self._seen else OperationRecorder())
        with contextlib.ExitStack() as stack:
            for point in self.points:
                hook = point.layer.register_forward_hook(watch.passed, with_kwargs=True)
                stack.callback(hook.remove)
            if watch.recorder is not None:
                stack.enter_context(watch.recorder)
            yield
        watch.check_complete()

    def settle_order(self, order: list[ControlPoint], found: list[tuple[Nonlinearity, bool]]) -> None:
        """Take over what the first forward pass has shown: the layers' order and nonlinearities."""
        for point, (nonlinearity, overwrites) in zip(order, found):
            point.nonlinearity, point.overwrites = nonlinearity, overwrites
        reordered = [p.name for p in order] != [p.name for p in self.points]
        self.points = order
        self._seen.add(self.module.training)
        if reordered:
            self._initialise_feedback()

    def adopt(self, activity: Activity) -> None:
        """Feedback weights that are initialised from activity take their values from this one."""
        if self.feedback_init == "jacobian":
            for q, value in zip(self.feedback, averaged_pseudoinverse(self.chain(), activity)):
                q.data = value
            self.feedback_init = "weight_product"  # values are given now: none to be taken from activity

    def state_dict(self) -> dict[str, Tensor]:
        """The feedback weights by the names of their layers."""
        return {point.name: q.detach().clone() for point, q in zip(self.points, self.feedback)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over feedback weights saved by :meth:`state_dict`.

        Raises:
            ControlError: they belong to another network; nothing is changed then.
        """
        known = {point.name: point for point in self.points}
        if set(state) != set(known):
            raise ControlError(
                f"The feedback weights to load are for the layers {sorted(state)}, but this network has "
                f"{sorted(known)}. Load them into the network they were saved from."
            )
        # The order saved is the order of the chain, if no forward pass has shown it yet.
        order = self.points if self._seen else [known[name] for name in state]
        for point in order:
            shape, needed = tuple(state[point.name].shape), (point.width, order[-1].width)
            if shape != needed:
                raise ControlError(
                    f"The feedback weight to load for {point.name!r} has the shape {shape}, but the layer's units and "
                    f"the network's outputs make {needed}. Load it into the network it was saved from."
                )
        self.points = order
        self.feedback = [nn.Parameter(state[p.name].to(p.layer.weight.device, self.dtype)) for p in order]
        if self.feedback_init == "jacobian":
            self.feedback_init = "weight_product"  # values are given: none to be taken from activity

    def _initialise_feedback(self) -> None:
        weights = [p.layer.weight.detach().to(self.dtype) for p in self.points]
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

    def __init__(self, activity: Activity) -> None:
        super().__init__()
        self.activity = activity


class _Watch:
    """The hooks' record of one forward pass."""

    def __init__(
        self,
        network: ControlledNetwork,
        at_output: Callable[[Activity, Tensor], Tensor],
        recorder: OperationRecorder | None,
    ) -> None:
        self.network, self.at_output, self.recorder = network, at_output, recorder
        self.waiting = {id(point.layer): point for point in network.points}
        self.order: list[ControlPoint] = []
        self.inputs: list[Tensor] = []
        self.voltages: list[Tensor] = []
        self.found: list[tuple[Nonlinearity, bool]] = []
        self.handed_on: Tensor | None = None

    def passed(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Forward hook: note what went in and out, and hand the output on without its history."""
        point = self.waiting.pop(id(layer), None)
        if point is None:
            name = next(p.name for p in self.network.points if p.layer is layer)
            raise ControlError(
                f"The layer {name!r} is called twice in one step. Feedback control settles one pass of the network; "
                "call it once in training_step, and use each layer once in it."
            )
        received = args[0] if args else kwargs["input"]
        if output.dim() != 2:
            raise ControlError(
                f"The layer {point.name!r} returns the shape {tuple(output.shape)}; a controlled layer maps (B, n_in) "
                "to (B, n_out). Flatten its input to two dimensions."
            )
        if received.requires_grad and torch.is_grad_enabled():
            raise ControlError(
                f"The input of the layer {point.name!r} wants a gradient, but feedback control sends none back through "
                "a layer: what computes it would not learn. Freeze that with requires_grad_(False), or detach() it."
            )
        if self.recorder is not None and self.handed_on is not None:
            before = self.voltages[-1]
            self.found.append(self.recorder.path(self.handed_on, received, before, self.order[-1].name))
        if self.network._seen and self.network.points[len(self.order)] is not point:
            raise ControlError(
                f"The layer {point.name!r} is called in another order than in the first step. The layers of a "
                "controlled chain follow each other the same way in every step."
            )
        self.order.append(point)
        self.inputs.append(received.detach())
        voltage = output.detach()
        keep = self.recorder is not None or point.overwrites
        self.voltages.append(voltage.clone() if keep else voltage)
        if self.waiting:
            self.handed_on = voltage
            return voltage
        return self.at_output(self._activity(), output)

    def _activity(self) -> Activity:
        network = self.network
        if self.recorder is not None:
            network.settle_order(self.order, [*self.found, (Identity(), False)])
        chain = network.chain()
        dtype = network.dtype
        with torch.autocast(self.inputs[0].device.type, enabled=False):
            if self.voltages[0].dtype != dtype:  # autocast: settle from a feedforward pass in full precision
                activity = chain.feedforward(self.inputs[0].to(dtype))
            else:
                rates = [*self.inputs[1:], self.voltages[-1]]
                activity = Activity(self.inputs[0], self.voltages, rates, chain.nonlinearities)
            if self.recorder is not None:
                network.adopt(activity)
        return activity

    def check_complete(self) -> None:
        """Complain of layers that the pass did not reach."""
        if not self.waiting:
            return
        names = [point.name for point in self.waiting.values()]
        if not self.order:
            raise ControlError(
                f"The network was not called: none of its layers ({', '.join(names)}) was run in this step. Call it "
                "once in training_step; a module compiled before training hides its layers, so compile it later."
            )
        raise ControlError(
            f"The layers {', '.join(names)} were not run in this step, and cannot be taught. Freeze them with "
            "requires_grad_(False), or name the submodule to control with network='…'."
        )
