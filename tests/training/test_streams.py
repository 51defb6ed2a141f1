"""Feedback passes end where training would, and take nothing from data that can be drawn but once."""

from __future__ import annotations

import os
import queue
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases.fits import BATCH, BATCHES, SHORT, Innocent, Plain, clusters, differing, loader, quiet, strategy
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from test_resume import interrupted, raise_at, run
from torch.utils.data import DataLoader, Dataset, IterableDataset

from dfc_lightning import FeedbackLearning
from dfc_lightning.training import bounds

EPOCH = 12  # batches of the finite sources here
DATA = clusters(EPOCH * BATCH)


class Order(Plain):
    """Notes the batches it is trained on."""

    def on_fit_start(self) -> None:
        self.trained: list[float] = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.trained.append(float(batch[0].sum()))


# Data that can be drawn once


def samples() -> Iterator[Any]:
    yield from DATA


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from DATA


class OwnIterator(IterableDataset):
    def __init__(self) -> None:
        self.source = samples()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self.source)


class OverAGenerator(IterableDataset):
    def __init__(self) -> None:
        self.source = samples()

    def __iter__(self) -> Iterator[Any]:
        yield from self.source


class OverAQueue(IterableDataset):
    def __init__(self) -> None:
        self.queue: queue.Queue = queue.Queue()
        for sample in DATA:
            self.queue.put(sample)

    def __iter__(self) -> Iterator[Any]:
        while not self.queue.empty():
            yield self.queue.get()


class TakenOnce(Dataset):
    """Has a length and an index, and yet gives each sample once."""

    def __init__(self) -> None:
        self.source = samples()

    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, index: int) -> Any:
        return next(self.source)


class Sized:
    """A loader of one's own with a length, over batches that come once."""

    def __init__(self) -> None:
        self.source = iter(list(loader(DATA)))

    def __len__(self) -> int:
        return EPOCH

    def __iter__(self) -> Iterator[Any]:
        yield from self.source


class StartsOver:
    """Its own iterator: to start it again takes it away from whoever is reading."""

    def __len__(self) -> int:
        return EPOCH

    def __iter__(self) -> StartsOver:
        self.batches = iter(list(loader(DATA)))
        return self

    def __next__(self) -> Any:
        return next(self.batches)


ONCE: dict[str, Callable[[], Any]] = {
    "a generator": lambda: (batch for batch in loader(DATA)),
    "an iterator": lambda: iter(list(loader(DATA))),
    "its own iterator": StartsOver,
    "sized, over an iterator": Sized,
    "endless": lambda: loader(Endless()),
    "an iterator as dataset": lambda: loader(OwnIterator()),
    "dataset over a generator": lambda: loader(OverAGenerator()),
    "dataset over a queue": lambda: loader(OverAQueue()),
    "dataset whose samples are taken": lambda: loader(TakenOnce()),
    "dataset wrapped": lambda: loader(torch.utils.data.Subset(TakenOnce(), range(len(DATA)))),
    "an iterator as sampler": lambda: DataLoader(DATA, BATCH, sampler=iter(range(len(DATA)))),
    "one of two": lambda: [loader(DATA), loader(OverAGenerator())],
}


def of_one_or_two(module: Plain, batch: Any) -> torch.Tensor:
    x, y = batch if isinstance(batch[1], torch.Tensor) else batch[1]
    return torch.nn.functional.cross_entropy(module(x), y)


class Either(Order):
    def __init__(self) -> None:
        super().__init__(of_one_or_two)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch if isinstance(batch[1], torch.Tensor) else batch[1], batch_idx)


@pytest.mark.slow
@pytest.mark.parametrize("name", ONCE)
def test_what_is_drawn_once_is_trained_on_as_without_the_strategy(name):
    orders, s = [], strategy(feedback=FeedbackLearning(method=SHORT, initial_passes=2, max_batches=7))
    for word in ("auto", s):
        module = Either()
        quiet(word, max_epochs=1, max_steps=20).fit(module, ONCE[name]())
        orders.append(module.trained)
    assert orders[0] == orders[1] and len(orders[0]) == (20 if name == "endless" else EPOCH)
    assert s.learner.steps == 2 * 7  # those of the first pass in hand, and none left of the epoch's own


def test_feedback_learns_from_a_batch_in_hand_before_it_is_trained_on():
    events: list[tuple[str, float]] = []

    class Noted(Order):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            events.append(("trained", float(batch[0].sum())))

    module = Noted(lambda m, batch: events.append(("run", float(batch[0].sum()))) or of_one_or_two(m, batch))
    learning = FeedbackLearning(method=SHORT, initial_passes=1, passes_per_epoch=1, max_batches=2)
    quiet(strategy(feedback=learning)).fit(module, loader(Listed()))
    sums = [float(x.sum()) for x, _ in loader(DATA)]
    expected = []
    for _ in range(2):  # the initial pass has taken the first epoch's batches
        for k, value in enumerate(sums):
            expected += [("run", value)] * (1 + (k < 2)) + [("trained", value)]
    assert events == expected


def test_a_batch_that_training_step_takes_apart_is_whole_when_it_is_trained_on():
    def step(module: Plain, batch: Any) -> torch.Tensor:
        y, x = batch.pop("y"), batch["x"]
        logits = module(x.mul_(2))
        return torch.nn.functional.cross_entropy(logits, y)

    class Taken(Plain):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            sums.append(float(batch["x"].sum()))

    sums: list[float] = []
    quiet(strategy(), max_epochs=1).fit(Taken(step), ({"x": x, "y": y} for x, y in list(loader(DATA))))
    assert sums == [float((2 * x).sum()) for x, _ in loader(DATA)]


class Listed(IterableDataset):
    """A stream without length, of the same samples each time."""

    def __iter__(self) -> Iterator[Any]:
        return iter(list(DATA))


@pytest.mark.slow
@pytest.mark.parametrize("call", [0, 3, 9, 20, 31, 36])
def test_a_stream_is_resumed_exactly(call, tmp_path):
    learning = FeedbackLearning(method=SHORT, initial_passes=2, passes_per_epoch=1, max_batches=5, every_n_batches=2)
    settings: dict[str, Any] = dict(learning=learning, max_epochs=2)
    whole = run(data=loader(Listed()), **settings)
    path = interrupted(tmp_path, at_call=raise_at(call), data=loader(Listed()), **settings)
    assert not differing(run(path, data=loader(Listed()), **settings), whole)


def test_sigterm_between_two_steps_on_a_batch_in_hand(tmp_path):
    def told(call: int) -> None:
        if call == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    learning = FeedbackLearning(method=SHORT, initial_passes=3, max_batches=5)
    whole = run(data=loader(Listed()), learning=learning, max_epochs=1)
    path = interrupted(tmp_path, SIGTERMException, at_call=told, data=loader(Listed()), learning=learning, max_epochs=1)
    assert torch.load(path, weights_only=True)["dfc_lightning"]["stages"]["passes"] == 1
    assert not differing(run(path, data=loader(Listed()), learning=learning, max_epochs=1), whole)


AGAIN: dict[str, Callable[[], Any]] = {
    "a loader": lambda: loader(DATA),
    "a loader of one's own with a length": lambda: Wrapped(),
    "a file behind an index": lambda: loader(WithAFile()),
}


class Wrapped:
    def __init__(self) -> None:
        self.inner = loader(DATA, num_workers=0)

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[Any]:
        yield from self.inner


class WithAFile(Dataset):
    def __init__(self) -> None:
        self.file = open(__file__, "rb")

    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, index: int) -> Any:
        self.file.seek(index)
        return DATA[index]


@pytest.mark.parametrize("name", AGAIN)
def test_what_can_be_read_again_has_passes_of_its_own(name):
    s, before = strategy(), []

    class First(Callback):
        def on_before_zero_grad(self, *args: Any) -> None:
            before.append(s.learner.steps)

    quiet(s, max_epochs=1, callbacks=[First()]).fit(Plain(), AGAIN[name]())
    assert before[0] == 2 * EPOCH == s.learner.steps


# What bounds a pass


BOUNDS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "max_steps": ({"max_steps": 3}, {}, 3),
    "max_steps, accumulating": ({"max_steps": 2, "accumulate_grad_batches": 2}, {}, 4),
    "max_steps in a later epoch": ({"max_steps": BATCHES + 2, "max_epochs": -1}, {}, BATCHES + 2),
    "max_batches": ({}, {"max_batches": 2}, 2 + 2 + 2),
    "limit_train_batches": ({"limit_train_batches": 4, "max_epochs": 1}, {}, 4 + 4),
    "the least of them": ({"limit_train_batches": 4, "max_steps": 3}, {"max_batches": 2}, 2 + 2),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_a_pass_is_no_longer_than(name):
    settings, learning, steps = BOUNDS[name]
    initial = 0 if name in ("max_steps", "max_steps, accumulating", "max_steps in a later epoch") else 1
    s = strategy(feedback=FeedbackLearning(method=SHORT, initial_passes=initial, passes_per_epoch=1, **learning))
    drawn = Counted()
    trainer = quiet(s, **settings)
    trainer.fit(Plain(), loader(drawn))
    assert s.learner.steps == steps
    trained = trainer.fit_loop.epoch_loop.batch_progress.total.completed
    assert drawn.fetched <= (steps + trained + 1) * BATCH  # Lightning looks one batch ahead


class Counted(Dataset):
    fetched = 0

    def __len__(self) -> int:
        return BATCHES * BATCH

    def __getitem__(self, index: int) -> Any:
        self.fetched += 1
        return DATA[index]


class EndlessOrder(torch.utils.data.Sampler):
    def __iter__(self) -> Iterator[int]:
        while True:
            yield from range(BATCHES * BATCH)


def test_an_endless_order_of_samples_has_a_bounded_pass(monkeypatch):
    monkeypatch.setattr(bounds, "STREAM_BATCHES", 9)
    s = strategy(feedback=FeedbackLearning(method=SHORT, passes_per_epoch=0))
    trainer = quiet(s, max_epochs=1, max_steps=20)
    trainer.fit(Plain(), DataLoader(DATA, BATCH, sampler=EndlessOrder()))
    assert s.learner.steps == 9 and trainer.global_step == 20


@pytest.mark.parametrize("by", ["max_time", "a Timer"])
def test_passes_take_half_of_the_time_that_is_left(by):
    module, s = Innocent(), strategy(feedback=FeedbackLearning(method=SHORT, initial_passes=5, passes_per_epoch=2))
    module.at_call = lambda call: time.sleep(0.01)
    settings: dict[str, Any] = {"max_time": {"seconds": 1}}
    if by == "a Timer":
        settings = {"callbacks": [Timer({"seconds": 1})]}
    started = time.monotonic()
    trainer = quiet(s, max_epochs=1, **settings)
    trainer.fit(module, loader(clusters(4000)))
    assert time.monotonic() - started < 2 and 5 < s.learner.steps < 60
    assert trainer.global_step > 5 and s.stages.progress.initial_done


def test_a_trainer_that_is_told_to_stop_stops_in_a_pass():
    module, s = Innocent(), strategy()
    module.at_call = lambda call: setattr(module.trainer, "should_stop", call >= 2)
    quiet(s).fit(module, loader())
    assert s.learner.steps == 3 + 1  # the epoch's own pass was told so once more


@pytest.mark.parametrize("value", [0, -1])
def test_max_batches_must_be_positive(value):
    with pytest.raises(ValueError, match=rf"max_batches={value} is not possible"):
        FeedbackLearning(max_batches=value)
