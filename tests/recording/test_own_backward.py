"""Functions with a backward of their own: the derivative that their author wrote is the one that control sees."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionMeta, once_differentiable
from torch.utils.checkpoint import checkpoint

from dfc_lightning import DFC, Backprop, ControlError, ControlledNetwork
from dfc_lightning.passes.recorded import RecordedPass


class Straight(Function):
    forward = staticmethod(lambda ctx, x: torch.sign(x))
    backward = staticmethod(lambda ctx, g: g)


class Windowed(Function):
    """A spike whose surrogate is a triangle as wide as its second argument says."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, width: float, name: str = "") -> Tensor:
        ctx.save_for_backward(x)
        ctx.width = width
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return grads[0] * (1 - x.abs() / ctx.width).relu(), None, None


class Reversed(Function):
    """Hands its argument on as it is, not even a view of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float = 1.0) -> Tensor:
        ctx.strength = strength
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return -ctx.strength * grads[0], None


class SetUpApart(Function):
    """Rounds to a step that is a tensor, with a context of its own."""

    @staticmethod
    def forward(x: Tensor, step: Tensor) -> Tensor:
        return torch.round(x / step) * step

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.step = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * 1.5, None


class MostLikely(Function):
    """One of n, with the derivative of softmax: no entry by itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.one_hot(x.argmax(1), x.shape[1]).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        p = torch.softmax(ctx.saved_tensors[0], 1)
        return p * (grads[0] - (p * grads[0]).sum(1, keepdim=True))


class Pair(Function):
    """Two results of two arguments, and one that has no derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Any:
        ctx.save_for_backward(x, y)
        won = x > y
        ctx.mark_non_differentiable(won)
        return torch.sign(x) * y, won, torch.where(won, x, y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, y = ctx.saved_tensors
        return grads[0] * y + grads[2], grads[0] * x - 2 * grads[2]


class OnceOnly(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.sign(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] / (1 + ctx.saved_tensors[0].abs()) ** 2


class ByNumpy(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.floor(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        slope = torch.from_numpy(1 / (1 + ctx.saved_tensors[0].detach().numpy() ** 2))
        return grads[0].detach() * slope


straight, windowed = Straight.apply, Windowed.apply  # taken from the class long before any pass


def pair(v: Tensor) -> Tensor:
    product, won, larger = Pair.apply(v, 0.5 * v + 0.1)
    return product + larger * torch.where(won, 1.0, 0.5)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "straight-through": lambda v: straight(v),
    "straight-through, from its class": lambda v: Straight.apply(v),
    "spike": lambda v: windowed(v, 2.0, "spike"),
    "reversed gradient": lambda v: Reversed.apply(v, 0.7),
    "context set up apart": lambda v: SetUpApart.apply(v, torch.tensor(0.3, dtype=v.dtype)),
    "not elementwise": lambda v: MostLikely.apply(v),
    "several results": pair,
    "once differentiable": lambda v: OnceOnly.apply(v),
    "by numpy": lambda v: ByNumpy.apply(v),
    "one after another": lambda v: Reversed.apply(Windowed.apply(torch.tanh(v), 1.5), 2.0),
    "past it": lambda v: 0.5 * v + straight(v),
    "result written into": lambda v: straight(v).mul_(0.5),
    "quantised": lambda v: torch.fake_quantize_per_tensor_affine(v, 0.1, 0, -8, 7),
    "quantised by tensors": lambda v: torch.fake_quantize_per_tensor_affine(
        v, torch.tensor(0.1), torch.tensor(0), -8, 7
    ),
    "quantised by units": lambda v: torch.fake_quantize_per_channel_affine(
        v, torch.linspace(0.05, 0.2, v.shape[1]), torch.zeros(v.shape[1], dtype=torch.int32), 1, -8, 7
    ),
}


class Between(nn.Module):
    """Layers of 12-10-10-3 with a function between each and the next."""

    def __init__(self, phi: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(12, 10), nn.Linear(10, 10), nn.Linear(10, 3)
        self.phi = phi

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.phi(self.b(self.phi(self.a(x)))))


def batch(size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 12, generator=generator), torch.randint(3, (size,), generator=generator)


def gradients(module: nn.Module, loss: Tensor) -> list[Tensor]:
    module.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in module.parameters()]


def by_autograd(module: nn.Module) -> list[Tensor]:
    x, y = batch()
    return gradients(module, F.cross_entropy(module(x), y))


def taught(net: ControlledNetwork, rule: Any) -> list[Tensor]:
    x, y = batch()
    with net.taught_by(rule):
        loss = F.cross_entropy(net(x), y)
    return gradients(net.module, loss)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))


@pytest.fixture(autouse=True)
def functions_are_left_alone() -> Iterator[None]:
    yield
    assert "__getattribute__" not in vars(FunctionMeta)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("seen", [False, True], ids=["first pass", "later pass"])
def test_errors_come_back_by_their_backward(name, seen):
    net = ControlledNetwork(Between(FUNCTIONS[name]))
    if seen:
        net.observe(batch()[0])
    for found, true in zip(taught(net, Backprop()), by_autograd(net.module), strict=True):
        assert torch.allclose(found, true, 1e-4, 1e-7)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_dfc_learns_by_their_backward(name):
    module = Between(FUNCTIONS[name])
    true = by_autograd(module)
    found = taught(ControlledNetwork(module, feedback_init="jacobian"), DFC(target_stepsize=0.1))
    assert cosine(torch.cat([g.flatten() for g in found]), torch.cat([g.flatten() for g in true])) > 0.5
    assert cosine(found[0], true[0]) > 0.3


def test_a_reversed_gradient_reverses_what_is_learned_before_it():
    reverse, straight_on = (
        taught(ControlledNetwork(Between(phi)), DFC(target_stepsize=0.1))
        for phi in (lambda v: torch.tanh(v), lambda v: Reversed.apply(torch.tanh(v)))
    )
    signs = [cosine(a, b) for a, b in zip(straight_on[::2], reverse[::2], strict=True)]
    assert signs[0] > 0.5 and signs[1] < -0.5 and signs[2] > 0.99  # twice reversed, once, never


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_control_changes_goes_on_by_the_transpose(name):
    forward = ControlledNetwork(Between(FUNCTIONS[name])).observe(batch()[0])
    generator = torch.Generator().manual_seed(2)
    driven = [torch.randn(v.shape, generator=generator) for v in forward.v]
    error = torch.randn(forward.output.shape, generator=generator)
    response = forward.linear_response(driven)
    back = sum((e * d).flatten(1).sum(1) for e, d in zip(forward.pull(error), driven, strict=True))
    assert torch.allclose((response * error).sum(1), back, 1e-3, 1e-4)


@pytest.mark.parametrize("phi", ["straight-through", "spike", "reversed gradient", "not elementwise", "quantised"])
def test_their_values_are_not_asked_under_control(phi):
    forward = ControlledNetwork(Between(FUNCTIONS[phi])).observe(batch()[0])
    driven = [0.3 * torch.ones_like(v) for v in forward.v]
    assert torch.allclose(forward.respond(driven).output, forward.linear_response(driven), 1e-4, 1e-6)


def test_what_else_they_are_given_may_be_another_in_every_step():
    module = Between(lambda v: Reversed.apply(v, module.strength))
    net = ControlledNetwork(module)
    for module.strength in (0.1, 0.5, 1.0):
        for found, true in zip(taught(net, Backprop()), by_autograd(module), strict=True):
            assert torch.allclose(found, true, 1e-4, 1e-7)
    assert isinstance(net.observe(batch()[0]), RecordedPass)


def test_under_autocast_too():
    x, y = batch()
    module = Between(FUNCTIONS["spike"])
    net = ControlledNetwork(module)
    true = by_autograd(module)
    with net.taught_by(Backprop()), torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(net(x), y)
    assert all(cosine(a, b) > 0.9 for a, b in zip(gradients(module, loss), true, strict=True))


def test_observers_that_have_seen_enough_may_quantise():
    quantiser = torch.ao.quantization.default_fake_quant()
    fused = torch.ao.quantization.default_fused_act_fake_quant()
    for each in (quantiser, fused):
        module = Between(each)
        with pytest.raises(ControlError, match=r"detach\(\)|disable_observer"):
            taught(ControlledNetwork(module), Backprop())
        each.apply(torch.ao.quantization.disable_observer)
        for found, true in zip(taught(ControlledNetwork(module), Backprop()), by_autograd(module), strict=True):
            assert torch.allclose(found, true, 1e-4, 1e-7)


# Those that cannot be followed


class Clipped(Function):
    forward = staticmethod(lambda ctx, x: x.view_as(x))
    backward = staticmethod(lambda ctx, g: g.clamp(-0.01, 0.01))


class Averaged(Function):
    forward = staticmethod(lambda ctx, x: x.view_as(x))
    backward = staticmethod(lambda ctx, g: g.mean(0, keepdim=True).expand_as(g))


class OnceOnlyMixed(Function):
    forward = staticmethod(lambda ctx, x: torch.sign(x))
    backward = staticmethod(once_differentiable(lambda ctx, g: g + g.roll(1, 1)))


class TwiceMixed(Function):
    """The same, as the error asks for it."""

    forward = staticmethod(lambda ctx, x: torch.sign(x))
    backward = staticmethod(lambda ctx, g: g + g.roll(1, 1))


class InPlace(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.sign_()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0]


class Stochastic(Function):
    forward = staticmethod(lambda ctx, x: (torch.rand_like(x) < torch.sigmoid(x)).to(x.dtype))
    backward = staticmethod(lambda ctx, g: g)


class Drawn(Function):
    """The same, as the error asks for it."""

    forward = staticmethod(lambda ctx, x, u: (u < torch.sigmoid(x)).to(x.dtype))
    backward = staticmethod(lambda ctx, g: (g, None))


class NoBackward(Function):
    forward = staticmethod(lambda ctx, x: torch.sign(x))
    backward = staticmethod(lambda ctx, g: None)


UNFIT: dict[str, tuple[type[Function], str]] = {
    "clips": (Clipped, "Clipped has a backward .* not linear in the gradient"),
    "mixes samples": (Averaged, "Averaged has a backward .* samples hear of each other"),
    "once differentiable": (OnceOnlyMixed, "OnceOnlyMixed has a backward .*once_differentiable"),
    "writes into its argument": (InPlace, "InPlace overwrites its argument.*new tensor"),
    "draws random numbers": (Stochastic, "Stochastic gives another result .*draw them outside"),
    "sends nothing back": (NoBackward, "No error comes back to the layer 'a': .* NoBackward"),
}


@pytest.mark.parametrize("name", UNFIT)
@pytest.mark.parametrize("rule", [Backprop(), DFC()])
def test_what_cannot_be_followed_is_refused_by_name(name, rule):
    function, message = UNFIT[name]
    with pytest.raises(ControlError, match=message):
        taught(ControlledNetwork(Between(lambda v: function.apply(v))), rule)


@pytest.mark.parametrize("name", UNFIT)
def test_behind_frozen_layers_it_may_stay(name):
    module = Between(torch.tanh)
    module.forward = lambda x: module.c(torch.tanh(module.b(UNFIT[name][0].apply(module.a(x)))))
    module.a.requires_grad_(False)
    net = ControlledNetwork(module)
    with net.taught_by(DFC()):
        loss = net(batch()[0]).square().mean()
    loss.backward()
    assert module.b.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "remedy",
    [lambda v: TwiceMixed.apply(v), lambda v: Drawn.apply(v, torch.rand_like(v))],
    ids=["no once_differentiable", "random numbers from outside"],
)
def test_what_the_errors_ask_for_is_followed(remedy):
    module = Between(remedy)
    net = ControlledNetwork(module)
    torch.manual_seed(3)
    found = taught(net, Backprop())
    torch.manual_seed(3)
    for each, true in zip(found, by_autograd(module), strict=True):
        assert torch.allclose(each, true, 1e-4, 1e-7)


# How they are noticed


def test_those_called_without_gradients_are_looked_at_alone():
    def phi(v: Tensor) -> Tensor:
        with torch.no_grad():
            Stochastic.apply(v).mean()
        return torch.tanh(v)

    module = Between(phi)
    for found, true in zip(taught(ControlledNetwork(module), Backprop()), by_autograd(module), strict=True):
        assert torch.allclose(found, true, 1e-4, 1e-7)


def test_another_thread_s_are_not_noticed():
    seen: list[Tensor] = []

    def phi(v: Tensor) -> Tensor:
        own = v.clone()
        thread = threading.Thread(target=lambda: seen.append(InPlace.apply(own)))  # would be refused here
        thread.start()
        thread.join()
        return straight(v)

    module = Between(phi)
    for found, true in zip(taught(ControlledNetwork(module), Backprop()), by_autograd(module), strict=True):
        assert torch.allclose(found, true, 1e-4, 1e-7)
    assert len(seen) == 4  # twice in each of the two passes


def test_two_networks_may_be_watched_at_once():
    first, second = (ControlledNetwork(Between(straight)) for _ in range(2))
    x, y = batch()
    with first.taught_by(Backprop()):
        with second.taught_by(Backprop()):
            loss = F.cross_entropy(second(x), y)
        loss = loss + F.cross_entropy(first(x), y)
    loss.backward()
    for net in (first, second):
        found = [p.grad.clone() for p in net.module.parameters()]
        for each, true in zip(found, by_autograd(net.module), strict=True):
            assert torch.allclose(each, true, 1e-4, 1e-7)


def kept_apart(reentrant: bool) -> nn.Module:
    module = Between(torch.tanh)
    module.phi = lambda v: checkpoint(torch.tanh, v, use_reentrant=reentrant)
    return module


def test_activations_may_be_checkpointed_as_the_error_says():
    with pytest.raises(ControlError, match="CheckpointFunction has a backward of its own .*use_reentrant=False"):
        taught(ControlledNetwork(kept_apart(True)), Backprop())
    module = kept_apart(False)
    for found, true in zip(taught(ControlledNetwork(module), Backprop()), by_autograd(module), strict=True):
        assert torch.allclose(found, true, 1e-4, 1e-7)


def test_functions_are_left_alone_after_an_error():
    net = ControlledNetwork(Between(lambda v: Straight.apply(v).no_such_thing))
    with pytest.raises(AttributeError), net.taught_by(Backprop()):
        net(batch()[0])
