"""Direct random target projection against its formula, by autograd's own activity, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases.chains import close
from cases.through import NETS, made
from torch import Tensor, nn

from dfc_lightning import DFA, ControlError, ControlledNetwork, DirectRandomTargetProjection, LearningRule

nets = pytest.mark.parametrize("name", NETS)
generals = pytest.mark.parametrize("general", [False, True], ids=["", "general"])


def taught(net: ControlledNetwork, rule: LearningRule, loss: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    net.module.zero_grad()
    with net.taught_by(rule):
        found = loss(net(x), y)
    found.backward()
    return [p.grad.clone() for p in net.module.parameters()]


def test_hidden_layers_learn_from_the_label_alone():
    """−φ'(v_i) Q_i y rᵀ by hand, for hard and soft labels and for squared errors."""
    module, x, hard = made("mlp")
    soft = torch.rand(5, 3, dtype=x.dtype).softmax(1)
    half = nn.MSELoss(reduction="sum")
    cases = [
        (DirectRandomTargetProjection("softmax"), nn.CrossEntropyLoss(), hard, F.one_hot(hard, 3).to(x)),
        (DirectRandomTargetProjection("softmax"), nn.CrossEntropyLoss(), soft, soft),
        (DirectRandomTargetProjection("identity"), lambda out, y: half(out, y) / 2 / len(x), soft, soft),
    ]
    for rule, loss, y, label in cases:
        net = ControlledNetwork(module, seed=0)
        found = taught(net, rule, loss, x, y)
        with torch.no_grad():
            v1 = module[0](x)
            v2 = module[2](v1.tanh())
            output = module[4](F.softplus(v2))
            q1, q2 = net.feedback[:2]
            d1, d2 = -(1 - v1.tanh() ** 2) * (label @ q1.T), -v2.sigmoid() * (label @ q2.T)
            own = (output if rule.link == "identity" else output.softmax(1)) - label
            parts = [(d1, x), (d2, v1.tanh()), (own, F.softplus(v2))]
            expected = [each for d, r in parts for each in (d.T @ r / len(x), d.mean(0))]
        assert all(close(a, b, 1e-10) for a, b in zip(found, expected))


@nets
@generals
def test_no_prediction_reaches_the_hidden_layers(name, general):
    """It is DFA's update in a network whose output is silent, where g(r_L) is the same for all; and is not DFA's."""
    module, x, y = made(name)
    net = ControlledNetwork(module, seed=0, general=general)
    rule = DirectRandomTargetProjection("softmax")
    with net.taught_by(rule):
        net(x)
    forward = net.bound(net.observe(x))
    label, p = F.one_hot(y, 3).to(x), forward.output.softmax(1)
    found = rule.teach(forward, p - label).gradients
    by_label = DFA().teach(forward, -label).gradients
    by_error = DFA().teach(forward, p - label).gradients
    for i, (mine, labels, errors) in enumerate(zip(found, by_label, by_error)):
        same = errors if i in forward.outputs_at else labels
        assert all(close(a, b, 1e-10) for a, b in zip(mine, same))
        assert i in forward.outputs_at or not close(mine[0], errors[0], 1e-2)


def test_it_is_not_the_gradient():
    module, x, y = made("mlp")
    found = taught(
        ControlledNetwork(module, seed=0), DirectRandomTargetProjection("softmax"), nn.CrossEntropyLoss(), x, y
    )
    module.zero_grad()
    F.cross_entropy(module(x), y).backward()
    cosine = F.cosine_similarity(found[0].flatten(), module[0].weight.grad.flatten(), dim=0)
    assert cosine < 0.9
    assert close(found[4], module[4].weight.grad, 1e-10)  # the output layer's is


def test_losses_that_tell_no_label_are_refused():
    module, x, y = made("mlp")
    net = ControlledNetwork(module, seed=0)
    with pytest.raises(ControlError, match="cross entropy.*link='identity'"):
        taught(net, DirectRandomTargetProjection("softmax"), nn.MSELoss(), x, torch.randn(5, 3, dtype=x.dtype))
    with pytest.raises(ValueError, match="link='logit'.*softmax"):
        DirectRandomTargetProjection("logit")
