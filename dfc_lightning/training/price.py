"""What a step by a rule costs, measured on the batch in hand, in steps of backprop on the same plumbing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from dfc_lightning.feedback_learning.learner import FeedbackLearner
from dfc_lightning.network.learning_rule import LearningRule
from dfc_lightning.passes.forward_pass import ForwardPass
from dfc_lightning.rules.backprop import Backprop

LONG = 0.3
"""Seconds of a step of backprop beyond which nothing more is measured, as it would delay the run."""


def price(rule: LearningRule, forward: ForwardPass, learner: FeedbackLearner | None = None) -> float | None:
    """Time of the rule's update, in that of backprop's, each with a forward pass; None if it cannot be had.

    Nothing is changed: neither weights, feedback weights nor generators. The output's error is one of cross entropy
    at the class that is least likely.

    Args:
        rule: the rule.
        forward: a pass, bound to the rule's feedback weights.
        learner: what gives them a step after every so many batches, counted in by its share.
    """
    output, device = forward.output, forward.output.device
    if forward.batch_size == 0:
        return None
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False), _private_generators(device):
            grad = output.softmax(1) - F.one_hot(output.argmin(1), output.shape[1])
            unit = _seconds(lambda: Backprop().teach(forward.again(), grad), device)
            if unit > LONG:
                return None
            taken = _seconds(lambda: rule.teach(_again(forward), grad), device)
            every = 0 if learner is None else learner.learning.every_n_batches
            if learner is not None and every:
                taken += _seconds(lambda: learner.gradients(_again(forward)), device) / every
    except Exception:  # it will be raised where it can be said what to do: by the step itself
        return None
    return taken / unit


def _again(forward: ForwardPass) -> ForwardPass:
    """The same pass once more, by which a step draws as it did."""
    return forward.again().with_chance(forward.chance)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """What a call takes; of a short one the least of three."""
    taken = [_timed(call, device)]
    while len(taken) < 3 and taken[0] < LONG:
        taken.append(_timed(call, device))
    return min(taken)


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _private_generators(device: torch.device) -> Any:
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
