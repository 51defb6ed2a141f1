"""Feedback weights are made by the first pass of a rule that has some, and not before, nor for rules without."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from cases.through import NETS, made
from torch import Tensor, nn

from dfc_lightning import (
    DFA,
    DFC,
    Backprop,
    ControlError,
    ControlledNetwork,
    Direct,
    ForwardPass,
    Layerwise,
    LearningRule,
    MinimumNorm,
    Update,
)
from dfc_lightning.network import feedback_weights
from dfc_lightning.passes import DensePass, RecordedPass

nets = pytest.mark.parametrize("name", NETS)


class Alignment(LearningRule):
    """Feedback alignment."""

    feedback: ClassVar[Layerwise] = Layerwise()

    def teach(self, forward: ForwardPass, loss_grad: Tensor) -> Update:
        return Update(forward.gradients(forward.pull(loss_grad, through=forward.feedback)))


class Mirrored(Alignment):
    """The same, from a copy of the weights."""

    feedback: ClassVar[Layerwise] = Layerwise(init="weights")


class Heard(LearningRule):
    """Notes what it is bound to."""

    feedback: ClassVar[Direct | Layerwise | None] = None
    bound: list[list[Tensor]]

    def teach(self, forward: ForwardPass, loss_grad: Tensor) -> Update:
        self.bound = [*getattr(self, "bound", []), list(forward.feedback)]
        return Update(forward.gradients(forward.pull(loss_grad)))


def step(net: ControlledNetwork, rule: LearningRule, x: Tensor, y: Tensor) -> None:
    with net.taught_by(rule):
        loss = F.cross_entropy(net(x), y)
    loss.backward()


@nets
@pytest.mark.parametrize("rule", [Backprop(), MinimumNorm()], ids=["backprop", "minimum norm"])
@pytest.mark.parametrize("init", [None, "jacobian"])
def test_rules_without_feedback_weights_make_none_and_form_no_jacobian_for_any(name, rule, init, monkeypatch):
    """MinimumNorm forms Jacobians when it teaches: the pass itself must not."""
    module, x, y = made(name)

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("formed without need")

    monkeypatch.setattr(feedback_weights, "initial_direct", never)
    monkeypatch.setattr(feedback_weights, "initial_layerwise", never)
    net = ControlledNetwork(module, feedback_init=init)
    with monkeypatch.context() as patch:
        for kind in (DensePass, RecordedPass):
            patch.setattr(kind, "_jacobians", never)
        with net.taught_by(rule) as lesson:
            loss = F.cross_entropy(net(x), y)
        if isinstance(rule, Backprop):
            loss.backward()
    if isinstance(rule, MinimumNorm):
        loss.backward()
    assert net.feedback == [] and net.state_dict() == {} and net.weights.kind is None
    assert len(lesson.forward.feedback) == 0
    assert all(p.grad.any() for p in module.parameters())


@nets
@pytest.mark.parametrize("rule", [DFC(), DFA()], ids=["DFC", "DFA"])
def test_direct_feedback_weights_are_made_by_the_first_pass_that_needs_them(name, rule):
    module, x, y = made(name)
    net = ControlledNetwork(module, seed=0)
    assert net.feedback == []
    step(net, Backprop(), x, y)
    assert net.feedback == []
    step(net, rule, x, y)
    shapes = [(v[0].numel(), 3) for v in net.observe(x).v]
    assert [tuple(q.shape) for q in net.feedback] == shapes and isinstance(net.weights.kind, Direct)
    before = net.state_dict()
    step(net, rule, x, y)
    assert all(torch.equal(before[k], q) for k, q in net.state_dict().items())


def test_they_start_as_the_rule_means_them_to_unless_the_user_says_otherwise():
    module, x, y = made("mlp")

    def first(rule: LearningRule, **arguments: Any) -> Tensor:
        net = ControlledNetwork(module, seed=0, **arguments)
        step(net, rule, x, y)
        return net.feedback[0].detach()

    product = module[2].weight.T @ module[4].weight.T
    assert torch.allclose(first(DFC()), product)
    assert torch.equal(first(DFA()), first(DFC(), feedback_init="xavier_normal"))
    assert torch.allclose(first(DFA(), feedback_init="weight_product"), product)


@nets
@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("rule", [Alignment(), Mirrored()], ids=["random", "weights"])
def test_layerwise_feedback_weights_have_the_shapes_of_the_weights(name, general, rule, monkeypatch):
    module, x, y = made(name)
    for kind in (DensePass, RecordedPass):
        monkeypatch.setattr(kind, "_jacobians", lambda self: pytest.fail("a Jacobian is formed"))
    net = ControlledNetwork(module, seed=0, general=general)
    step(net, rule, x, y)
    assert isinstance(net.weights.kind, Layerwise)
    for point, b in zip(net.points, net.feedback, strict=True):
        w = point.weight.detach()
        assert b.shape == w.shape and b.dtype == w.dtype
        if isinstance(rule, Mirrored):
            assert torch.equal(b, w) and b.data_ptr() != w.data_ptr()
        else:
            assert not torch.allclose(b, w) and 0.5 < float(b.detach().std() / w.std(correction=0)) < 2.0
    again = ControlledNetwork(module, seed=0, general=general)
    step(again, rule, x, y)
    assert all(map(torch.equal, net.feedback, again.feedback))


def test_a_point_without_a_weight_has_an_empty_one():
    module = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    net = ControlledNetwork(module)
    step(net, Alignment(), torch.randn(5, 6), torch.arange(5) % 3)
    assert [tuple(b.shape) for b in net.feedback] == [(0,), (4, 6), (3, 4)]


@nets
@pytest.mark.parametrize("rule", [DFC(), Alignment()], ids=["direct", "layerwise"])
@pytest.mark.parametrize("seen", [False, True])
def test_saved_feedback_weights_come_back(name, rule, seen):
    module, x, y = made(name)
    source, target = (ControlledNetwork(module, seed=seed) for seed in (0, 1))
    step(source, rule, x, y)
    with torch.no_grad():
        for q in source.feedback:
            q.mul_(1.5)
    if seen:
        step(target, rule, x, y)
    target.load_state_dict(source.state_dict(), source.weights.kind, source.outputs_at)
    step(target, rule, x, y)
    assert type(target.weights.kind) is type(source.weights.kind)
    assert list(target.state_dict()) == list(source.state_dict())
    assert all(map(torch.equal, target.feedback, source.feedback))
    assert tuple(target.outputs_at) == tuple(source.outputs_at)


def test_those_of_other_shapes_are_refused_and_nothing_changed():
    module, x, y = made("mlp")
    net = ControlledNetwork(module, seed=0)
    step(net, Alignment(), x, y)
    state = net.state_dict()
    for wrong in ({**state, "0": state["0"].T}, {**state, "2": state["2"][:-1]}):
        for target in (net, ControlledNetwork(module)):
            before = target.state_dict()
            with pytest.raises(ControlError, match="has the shape"):
                target.load_state_dict(wrong, Layerwise())
            assert all(torch.equal(before[k], q) for k, q in target.state_dict().items())


def test_a_rule_is_bound_to_the_feedback_weights_that_it_has():
    module, x, y = made("mlp")
    net = ControlledNetwork(module, seed=0)
    rule = Heard()
    step(net, DFC(), x, y)
    direct = [q.detach().clone() for q in net.feedback]
    step(net, rule, x, y)
    assert rule.bound == [[]] and all(map(torch.equal, net.feedback, direct))
    rule.feedback = Direct()  # type: ignore[misc]
    step(net, rule, x, y)
    assert all(map(torch.equal, rule.bound[1], direct))
    rule.feedback = Layerwise()  # type: ignore[misc]
    step(net, rule, x, y)
    assert [b.shape for b in rule.bound[2]] == [p.weight.shape for p in net.points]


@nets
def test_jacobians_are_those_of_the_pass_whatever_feedback_weights_there_are(name):
    module, x, y = made(name)
    net, other = ControlledNetwork(module), ControlledNetwork(module)
    step(other, Alignment(), x, y)
    assert torch.equal(net.jacobian(x), other.jacobian(x))
