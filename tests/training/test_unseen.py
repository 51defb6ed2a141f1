"""A feedback pass calls training_step, and the module does not know of it."""

from __future__ import annotations

import random
import warnings
from collections import Counter, deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases.fits import SHORT, clusters, differing, loader, quiet, strategy
from torch import Tensor, nn

from dfc_lightning import Backprop, ControlledNetwork, DFCStrategy, Direct, FeedbackLearning
from dfc_lightning.network.unseen import unseen

PASSES = FeedbackLearning(method=SHORT, initial_passes=2, passes_per_epoch=1)


class Stateful(L.LightningModule):
    """A network with one more thing in it that changes in training_step."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
        self.net.double()
        self.begin()

    def begin(self) -> None:
        pass

    def act(self, x: Tensor) -> Tensor:
        return x

    def look(self) -> Any:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(self.act(batch[0])), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05)


class FirstBatch(Stateful):
    resized = False

    def begin(self) -> None:
        self.scale = nn.Module()
        self.scale.ready = False
        self.scale.register_buffer("mean", torch.empty(0 if self.resized else 6, dtype=torch.float64))

    def act(self, x: Tensor) -> Tensor:
        if not self.scale.ready:
            self.scale.mean.resize_(6).copy_(x.mean(0))
            self.scale.ready = True
        return x - self.scale.mean

    def look(self) -> Any:
        return self.scale.mean


class FirstBatchResized(FirstBatch):
    resized = True


class LateBuffer(Stateful):
    def act(self, x: Tensor) -> Tensor:
        if not hasattr(self, "mean"):
            self.register_buffer("mean", x.mean(0))
        return x - self.mean

    def look(self) -> Any:
        return self.mean


class Schedule(Stateful):
    """A counter by which the input is scaled, and lists, dictionaries and queues that remember."""

    def begin(self) -> None:
        self.step, self.counts, self.recent = 0, Counter(), deque(maxlen=3)
        self.history: dict[str, Any] = {"sums": [], "nested": {"last": None}, "set": {0}}
        self.annealing = SimpleNamespace(value=1.0)

    def act(self, x: Tensor) -> Tensor:
        self.step += 1
        self.counts["steps"] += 1
        self.recent.append(self.step)
        self.history["sums"].append(float(x.sum()))
        self.history["nested"]["last"] = self.step
        self.history["set"].add(self.step)
        self.annealing.value *= 0.9
        return x * self.annealing.value

    def look(self) -> Any:
        return [self.step, dict(self.counts), list(self.recent), self.history["sums"], sorted(self.history["set"])]


class Slotted:
    __slots__ = ("seen",)

    def __init__(self) -> None:
        self.seen = 0


class Held(Stateful):
    """Tensors, arrays and objects that are no buffers, changed in place."""

    def begin(self) -> None:
        self.memory, self.array, self.slotted = torch.zeros(6, dtype=torch.float64), np.zeros(6), Slotted()

    def act(self, x: Tensor) -> Tensor:
        self.memory.data.add_(x.mean(0))
        self.array += x.mean(0).numpy()
        self.slotted.seen += len(x)
        return x + 0.01 * self.memory

    def look(self) -> Any:
        return [self.memory, torch.from_numpy(self.array), self.slotted.seen]


class Teacher(Stateful):
    """Weights that follow others, as the training step says."""

    def begin(self) -> None:
        self.teacher = nn.Linear(6, 12, bias=False, dtype=torch.float64).requires_grad_(False)
        nn.init.zeros_(self.teacher.weight)

    def act(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.teacher.weight.lerp_(self.net[0].weight, 0.1)
        return x

    def look(self) -> Any:
        return None  # it is one of the parameters


class Draws(Stateful):
    """Generators of numbers, and an iterator over other data."""

    def begin(self) -> None:
        self.torch_numbers = torch.Generator().manual_seed(1)
        self.numpy_numbers, self.numbers = np.random.default_rng(1), random.Random(1)
        self.others, self.countdown = iter(loader(clusters(400, 5))), (0.99**k for k in range(1000))
        self.drawn: list[float] = []

    def act(self, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=self.torch_numbers, dtype=x.dtype)
        factor = 1 + 0.01 * (self.numpy_numbers.random() + self.numbers.random() + next(self.countdown))
        self.drawn.append(float(next(self.others)[0].sum()) + factor)
        return x * factor + 0.01 * noise

    def look(self) -> Any:
        return self.drawn


class OwnIterator(Stateful):
    """An iterator of the user's own class, which has more than its next item."""

    class Steps:
        rate, left = 1.0, 1000

        def __iter__(self) -> Iterator[float]:
            return self

        def __next__(self) -> float:
            self.left -= 1
            return self.rate

    def begin(self) -> None:
        self.steps = self.Steps()

    def act(self, x: Tensor) -> Tensor:
        self.steps.rate *= 0.9
        return x * next(self.steps)

    def look(self) -> Any:
        return [self.steps.rate, self.steps.left]


class Prepared(Stateful):
    """What on_train_batch_start leaves is what training_step needs, of that batch."""

    def begin(self) -> None:
        self.ready: list[float] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.means, self.of = batch[0].mean(0), float(batch[0].sum())
        self.ready.append(self.of)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert self.of == float(batch[0].sum())
        return super().training_step((batch[0] - self.means, batch[1]), batch_idx)

    def look(self) -> Any:
        return self.ready


class InTheTransfer(Stateful):
    def begin(self) -> None:
        self.moved = 0

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.moved += 1
        return [batch[0] * (1 + 0.01 * self.moved), batch[1]]

    def look(self) -> Any:
        return self.moved


class Rates(Stateful):
    """Sets the optimizer's rate by the batches it has seen."""

    def begin(self) -> None:
        self.warm = 0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.warm += 1
        for group in self.optimizers().param_groups:
            group["lr"] = 0.01 * self.warm

    def look(self) -> Any:
        return self.optimizers().param_groups[0]["lr"]


class WithFeedback(Backprop):
    """Backprop beside feedback weights that learn and are not heard."""

    feedback: ClassVar[Direct] = Direct(learned=True)


KINDS = [FirstBatch, FirstBatchResized, LateBuffer, Schedule, Held, Teacher, Draws, OwnIterator, Prepared]
KINDS += [InTheTransfer, Rates]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True], ids=["passes", "in hand"])
def test_a_module_ends_as_without_feedback_passes(kind, stream):
    ends = []
    for word in ("auto", DFCStrategy(rule=WithFeedback(), feedback=PASSES, seed=3)):
        module, data = kind(), clusters(dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            warnings.filterwarnings("ignore", "(?!A feedback pass)")
            quiet(word, max_epochs=1).fit(module, (b for b in loader(data)) if stream else loader(data))
        ends.append([module.look(), [p.detach() for p in module.parameters()]])
        if word != "auto":
            assert word.learner.steps == (2 if stream else 3) * 5
    assert not differing(ends[1][0], ends[0][0])
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(ends[1][1], ends[0][1]))


def test_objects_stay_the_same_ones():
    module = Schedule()
    before = (module.history, module.history["sums"], module.recent, module.annealing, module.net[0].weight)
    with unseen(module):
        module.act(torch.ones(2, 6))
        module.history = {}
        module.net[0].weight = nn.Parameter(torch.zeros(12, 6))
        module.extra = 1
    after = (module.history, module.history["sums"], module.recent, module.annealing, module.net[0].weight)
    assert all(a is b for a, b in zip(after, before)) and not hasattr(module, "extra")


def test_an_iterator_gives_again_what_was_drawn_from_it_in_many_passes():
    holder = nn.Module()
    holder.numbers = iter(range(10))
    for _ in range(2000):
        with unseen(holder):
            assert [next(holder.numbers), next(holder.numbers)] == [0, 1]
    assert next(holder.numbers) == 0
    with unseen(holder):
        assert [next(holder.numbers), next(holder.numbers)] == [1, 2]
    assert list(holder.numbers) == list(range(1, 10))


def test_a_loop_of_ones_own_has_it_too():
    module = FirstBatch()
    net = ControlledNetwork(module, network="net")
    module.forward = lambda x: module.net(module.act(x))
    net.observe(torch.ones(4, 6, dtype=torch.float64))
    assert module.scale.ready is False


def test_what_cannot_be_put_back_is_said():
    class Stubborn(dict):
        def clear(self) -> None:
            raise TypeError("not this one")

    module = nn.Module()
    module.stubborn = Stubborn(a=1)
    with pytest.warns(UserWarning, match=r"could not be put back: stubborn \(not this one\).*on_train_batch_end"):
        with unseen(module):
            module.stubborn["b"] = 2


def test_strategies_keep_the_trainer_out_of_it():
    """The module holds its trainer, which goes on counting."""
    s = strategy(feedback=PASSES)
    trainer = quiet(s, max_epochs=2)
    trainer.fit(Schedule(), loader(clusters(dtype=torch.float64)))
    assert trainer.global_step == 10 and trainer.current_epoch == 2 and s.learner.steps == 5 * (2 + 2)
