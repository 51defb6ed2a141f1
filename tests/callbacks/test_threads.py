"""Threads are chosen by measurement, which leaves no trace in what is learned."""

import logging
import os

import lightning as L
import pytest
import torch
from cases.fits import Innocent, clusters, loader, quiet, strategy

from dfc_lightning import DirectRandomTargetProjection
from dfc_lightning.callbacks import ChooseThreads, threads


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def measured(monkeypatch, seconds):
    """Have a step take these seconds, by threads."""

    def times(step, most):
        assert most == 2
        torch.set_num_threads(1)
        step()
        step()
        return dict(seconds)

    monkeypatch.setattr(threads, "_times", times)


def fitted(*callbacks, by=None, module=None):
    L.seed_everything(3)
    module = module or Innocent()
    quiet(by or strategy(), max_epochs=1, callbacks=list(callbacks)).fit(module, loader(clusters(16, 5)))
    return module


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [({1: 1e-3, 2: 2e-3}, 1), ({1: 4e-3, 2: 1e-3}, 2), ({1: 1e-3, 2: 0.95e-3}, 1)],
    ids=["fewer are faster", "more are faster", "more are hardly faster"],
)
def test_the_faster_is_taken_and_said(monkeypatch, caplog, seconds, chosen):
    measured(monkeypatch, seconds)
    callback = ChooseThreads()
    with caplog.at_level(logging.INFO):
        fitted(callback)
    assert callback.chosen == chosen == torch.get_num_threads()
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Threads")]
    assert line.startswith(f"Threads: {chosen}, by measurement: a step takes {1e3 * seconds[1]:g} ms on 1")


def test_steps_are_measured_of_a_rule_that_asks_what_the_loss_wants(monkeypatch):
    measured(monkeypatch, {1: 1e-3, 2: 2e-3})
    callback = ChooseThreads()
    fitted(callback, by=strategy(rule=DirectRandomTargetProjection(), feedback=None))
    assert callback.chosen == 1


@pytest.mark.parametrize("by", [None, L.pytorch.strategies.SingleDeviceStrategy("cpu")], ids=["dfc", "backprop"])
def test_what_is_learned_is_what_would_have_been(monkeypatch, by):
    measured(monkeypatch, {1: 1e-3, 2: 2e-3})
    found = fitted(ChooseThreads(), by=by or strategy(seed=7))
    assert torch.get_num_threads() == 1
    true = fitted(by=L.pytorch.strategies.SingleDeviceStrategy("cpu") if by else strategy(seed=7))
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), true.state_dict().values(), strict=True))


def test_a_choice_of_the_users_is_left_alone(monkeypatch):
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "2")
    monkeypatch.setattr(threads, "_times", lambda step, most: pytest.fail("measured"))
    fitted(ChooseThreads())
    assert torch.get_num_threads() == 2
    monkeypatch.delenv("OMP_NUM_THREADS")
    fitted(ChooseThreads(threads=1))
    assert torch.get_num_threads() == 1
    with pytest.raises(ValueError, match="threads=0 must be one or more"):
        ChooseThreads(threads=0)


def test_a_module_that_cannot_be_copied_keeps_the_threads_there_were():
    class Single(Innocent):
        def __deepcopy__(self, memo):
            raise TypeError("there is but one")

    callback = ChooseThreads()
    module = fitted(callback, module=Single())
    assert callback.chosen is None and torch.get_num_threads() == 2 and module.trainer is not None


def test_steps_that_are_long_on_one_thread_keep_the_threads_there_were(monkeypatch):
    clock = iter(0.1 * k for k in range(100))
    monkeypatch.setattr(threads.time, "perf_counter", lambda: next(clock))
    assert threads._times(lambda: None, 2) == {} and torch.get_num_threads() == 2


def test_measuring_ends_with_the_first_step_that_takes_twice_the_best(monkeypatch):
    now, steps = [0.0], []

    def step():
        steps.append(torch.get_num_threads())
        now[0] += {1: 1e-3, 2: 1e-2}[torch.get_num_threads()]

    monkeypatch.setattr(threads.time, "perf_counter", lambda: now[0])
    found = threads._times(step, 2)
    assert steps == [1] * 4 + [2] * 2 and found == pytest.approx({1: 1e-3, 2: 1e-2})
