"""A rule of the user's own, of a few lines, on networks of any kind: feedback alignment (Lillicrap et al. 2016)."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from cases.through import NETS, made, swapped
from torch import Tensor

from dfc_lightning import ControlError, ControlledNetwork, ForwardPass, Layerwise, LearningRule, Update


class FeedbackAlignment(LearningRule):
    """Errors travel back through fixed random weights B_i instead of W_iᵀ."""

    feedback: ClassVar[Layerwise] = Layerwise()

    def teach(self, forward: ForwardPass, loss_grad: Tensor) -> Update:
        return Update(forward.gradients(forward.pull(loss_grad, through=forward.feedback)))


class Copied(FeedbackAlignment):
    feedback: ClassVar[Layerwise] = Layerwise(init="weights")


def gradients(name: str, rule: LearningRule, general: bool = False) -> tuple[ControlledNetwork, dict, dict, dict]:
    """The network, what the rule teaches, and autograd's gradients through B_i and through W_i."""
    module, x, y = made(name)
    net = ControlledNetwork(module, seed=0, general=general)
    with net.taught_by(rule):
        loss = F.cross_entropy(net(x), y)
    loss.backward()
    found = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    twin = swapped(module, [p.name for p in net.points], net.feedback)
    F.cross_entropy(twin(x), y).backward()  # into the same parameters, or copies of those of the normalisations
    names = [name for name, _ in module.named_parameters()]
    theirs = {n.replace(".layer.", "."): p.grad.clone() for n, p in twin.named_parameters()}
    module.zero_grad()
    F.cross_entropy(module(x), y).backward()
    return net, dict(zip(names, found)), theirs, {n: p.grad for n, p in module.named_parameters()}


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_feedback_alignment_is_autograd_with_the_weights_replaced_on_the_way_back(name, general):
    net, found, theirs, true = gradients(name, FeedbackAlignment(), general)
    assert net.may_be_dense == (name == "mlp" and not general)
    assert found.keys() == theirs.keys()
    for key, value in theirs.items():
        assert (found[key] - value).norm() <= 1e-10 * value.norm()
    first = next(iter(found))
    assert (found[first] - true[first]).norm() > 0.3 * true[first].norm()  # which is not the gradient


@pytest.mark.parametrize("name", NETS)
def test_through_a_copy_of_the_weights_it_is_the_gradient(name):
    _, found, _, true = gradients(name, Copied())
    assert all((found[key] - value).norm() <= 1e-10 * value.norm() for key, value in true.items())


def test_it_learns():
    module, x, y = made("conv")
    net, optimizer = ControlledNetwork(module, seed=0), torch.optim.SGD(module.parameters(), 0.1)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        with net.taught_by(FeedbackAlignment()):
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


class Transposed(LearningRule):
    """Returns the weights' gradients the wrong way round."""

    def teach(self, forward: ForwardPass, loss_grad: Tensor) -> Update:
        taught = forward.gradients(forward.pull(loss_grad))
        return Update([taught[0], [taught[1][0].mT, *taught[1][1:]], *taught[2:]])


class Short(LearningRule):
    """Leaves the last point out."""

    def teach(self, forward: ForwardPass, loss_grad: Tensor) -> Update:
        return Update(forward.gradients(forward.pull(loss_grad))[:-1])


class Biasless(LearningRule):
    """Forgets the biases."""

    def teach(self, forward: ForwardPass, loss_grad: Tensor) -> Update:
        return Update([each[:1] for each in forward.gradients(forward.pull(loss_grad))])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Transposed(), r"Transposed teaches the layer '2' gradients of the shapes \[\(7, 5\), \(5,\)\].*\(5, 7\)"),
        (Biasless(), r"Biasless teaches the layer '0' gradients of the shapes \[\(7, 6\)\].*\(7,\)"),
        (Short(), r"Short teaches 2 layers, but the network has 3: '0', '2', '4'"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_gradients_of_the_wrong_shapes_are_refused_with_the_names_of_rule_and_layer(rule, message):
    module, x, y = made("mlp")
    net = ControlledNetwork(module)
    with net.taught_by(rule):
        loss = F.cross_entropy(net(x), y)
    with pytest.raises(ControlError, match=message):
        loss.backward()
