"""Whatever the precision of the module, control is computed in float32 or better; and what compiling does."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.chains import degrees
from cases.fits import (
    LEARNING,
    NO_FEEDBACK,
    Innocent,
    Plain,
    clusters,
    differing,
    loader,
    quiet,
    strategy,
    untouched,
    weights,
)
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from dfc_lightning import DFC, ControlError, ControlledNetwork, DFCStrategy, Expected, FeedbackLearner, FeedbackLearning

SEEN: list[tuple[str, set[torch.dtype], bool]] = []


def note(where: str, *tensors: Tensor) -> None:
    SEEN.append((where, {t.dtype for t in tensors}, torch.is_autocast_enabled("cpu")))


@dataclass(frozen=True)
class WatchedDFC(DFC):
    def teach(self, forward: Any, loss_grad: Tensor) -> Any:
        note("teach", *forward.weights, *forward.feedback, *forward.v, forward.x, loss_grad)
        update = super().teach(forward, loss_grad)
        note("update", *update.weights, *update.biases, update.settled.control, update.settled.residual)
        return update


@dataclass(frozen=True)
class WatchedExpected(Expected):
    steps: int = field(default=10)

    def gradient(self, forward: Any, noise: Any) -> list[Tensor]:
        gradients = super().gradient(forward, noise)
        note("feedback", *forward.weights, *forward.v, *gradients, noise((1, 1)))
        return gradients


PRECISIONS = {
    "64-true": (torch.float64, torch.float64),
    "32-true": (torch.float32, torch.float32),
    "bf16-mixed": (torch.float32, torch.float32),
    "16-mixed": (torch.float32, torch.float32),
    "bf16-true": (torch.bfloat16, torch.float32),
}


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_control_is_in_float32_or_better_and_dfc_learns(precision):
    stored, computed = PRECISIONS[precision]
    module, held_out = Innocent(lr=0.02), loader(clusters(200, seed=1), 200)
    s = DFCStrategy(WatchedDFC(), FeedbackLearning(method=WatchedExpected(), every_n_batches=3), seed=1)
    SEEN.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on a CPU, Lightning takes bfloat16 for 16-mixed
        trainer = quiet(s, max_epochs=15, precision=precision)
        trainer.fit(module, loader(clusters(80), shuffle=True), held_out)
    assert {where for where, _, _ in SEEN} == {"teach", "update", "feedback"}
    assert all(dtypes == {computed} and not autocast for _, dtypes, autocast in SEEN)
    assert {p.dtype for p in module.parameters()} == {stored}
    assert {q.dtype for q in s.network.feedback} == {computed}
    assert trainer.callback_metrics["val_accuracy"] > 0.8
    assert torch.isfinite(weights(module)).all() and untouched(module)


def gradient(dtype: torch.dtype | None, scale: float = 1.0) -> Tensor:
    """A DFC update in one vector, under autocast to ``dtype``."""
    module = Innocent().net
    net = ControlledNetwork(module, seed=0)
    x, y = next(iter(loader()))
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None), net.taught_by(DFC()) as lesson:
        loss = F.cross_entropy(net(x), y)
        lesson.watch(loss)
    (loss * scale).backward()
    return torch.cat([p.grad.flatten() for p in module.parameters()]) / scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_update_under_autocast_points_where_it_would_without(dtype):
    assert degrees(gradient(dtype), gradient(None)) < 0.5
    assert degrees(gradient(dtype, 2.0**12), gradient(dtype)) < 0.1  # and a scale does not turn it


# A GradScaler that overflows


def test_a_step_that_overflows_is_skipped_and_the_next_ones_are_right():
    module = Innocent().net
    net = ControlledNetwork(module, seed=0)
    learner = FeedbackLearner(net, LEARNING)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**21)
    x, y = next(iter(loader()))
    learner.step(net.observe(x))
    skipped = stepped = 0
    while stepped < 3:
        before, q, scale = weights(module), net.state_dict(), scaler.get_scale()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16), net.taught_by(DFC()) as lesson:
            loss = F.cross_entropy(net(x), y)
            lesson.watch(loss)
        scaler.scale(loss).backward()
        assert not differing(net.state_dict(), q)
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < scale:
            assert scaler.get_scale() == scale / 2 and torch.equal(weights(module), before)
            skipped += 1
        else:
            moved = before - weights(module)
            assert torch.isfinite(moved).all() and moved.norm() > 0
            if not stepped:
                assert degrees(moved, gradient_at(module, before, q)) < 0.5
            stepped += 1
        assert torch.isfinite(learner.step(net.observe(x))["grad_norm"])
    assert skipped >= 2


def gradient_at(module: Any, at: Tensor, q: dict[str, Tensor]) -> Tensor:
    """The update in full precision, with the weights and feedback weights given."""
    twin = Innocent().net
    torch.nn.utils.vector_to_parameters(at, twin.parameters())
    net = ControlledNetwork(twin, seed=0)
    net.load_state_dict(q)
    x, y = next(iter(loader()))
    with net.taught_by(DFC()):
        loss = F.cross_entropy(net(x), y)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in twin.parameters()])


def test_lightnings_mixed_precision_skips_it_too():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**21)
    moves: list[tuple[float, bool]] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
            self.before = weights(module)

        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            moves.append((scaler.get_scale(), not torch.equal(weights(module), self.before)))

    s = strategy()
    module = Innocent()
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    quiet(s, plugins=plugin, callbacks=[Watch()], max_epochs=3).fit(module, loader())
    scales, moved = zip(*moves)
    skipped = moved.index(True)
    assert skipped >= 2 and all(moved[skipped:])
    assert list(scales[:skipped]) == [2.0 ** (20 - k) for k in range(skipped)]
    assert torch.isfinite(weights(module)).all() and all(torch.isfinite(q).all() for q in s.network.feedback)


# Compiling


class Compiles(Callback):
    """Compiles the module, or what is in it, in one of the trainer's hooks."""

    def __init__(self, hook: str, how: str) -> None:
        self.how = how
        setattr(self, hook, self.act)

    def act(self, trainer: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        if self.how == "in place":
            module.net.compile(backend="eager")
        elif self.how == "the whole module":
            module.compile(backend="eager")
        elif not isinstance(module.net, torch._dynamo.OptimizedModule):
            module.net = torch.compile(module.net, backend="eager")


HOOKS = ("setup", "on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start")
HOOKS += ("on_train_batch_end", "on_validation_end", "on_train_epoch_end")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["in place", "the whole module", "wrapped"])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_module_compiled_during_training_is_refused(hook, how):
    module = Innocent()
    with pytest.raises(ControlError, match="compiled"):
        quiet(strategy(), callbacks=[Compiles(hook, how)]).fit(module, loader(), loader(clusters(16, 5)))
    assert not any(m._forward_hooks for m in module.modules())


@pytest.mark.parametrize("learning", [LEARNING, NO_FEEDBACK], ids=["feedback passes", "fixed feedback"])
def test_a_compiled_loss_function_is_right(learning):
    compiled = torch.compile(F.cross_entropy, backend="eager")
    reached = []
    for loss in (F.cross_entropy, compiled):
        module = Plain(lambda module, batch, loss=loss: loss(module(batch[0]), batch[1]))
        quiet(strategy(feedback=learning)).fit(module, loader())
        reached.append(weights(module))
    assert torch.equal(*reached)


def test_a_trained_module_can_be_compiled():
    module, (x, _) = Innocent(), next(iter(loader()))
    quiet(strategy()).fit(module, loader())
    module.eval()
    expected = module(x)
    module.compile(backend="eager")
    assert torch.allclose(module(x), expected)
