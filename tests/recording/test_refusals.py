"""What cannot be controlled is refused, with its cause and a remedy, where it is noticed, and left as it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from dfc_lightning import DFC, Backprop, ControlError, ControlledNetwork


class Via(nn.Module):
    """``forward`` is any function of the module and its input; the layers are 6-5-4-3."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Maps(nn.Module):
    """``forward`` is any function of a convolution, a dense layer of 72 inputs, and maps of 2 × 6 × 6."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.c, self.fc = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(72, 3)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.m, self.o = nn.LSTM(2, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x.view(-1, 3, 2), [3] * len(x), batch_first=True)
        return self.o(self.m(packed)[1][0][0])


class Normed(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv1d(1, 4, 2), norm, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.norm(self.a(x.unsqueeze(1)))).mean(2))


def sequential(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), *between, nn.Linear(5, 3))


def quantising() -> nn.Module:
    net = sequential(nn.Tanh()).train()
    net.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    return torch.ao.quantization.prepare_qat(net)


@torch.jit.script
def scripted_swish(h):
    return h * torch.sigmoid(h)


def via(between: Callable[[Tensor], Tensor]) -> nn.Module:
    return Via(lambda m, x: m.c(m.b(between(m.a(x)))))


def after(end: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    """A chain whose output ``end`` goes on with, and with what the first layer has sent."""

    def run(m: Via, x: Tensor) -> Tensor:
        h = m.a(x)
        return end(m.c(torch.tanh(m.b(torch.tanh(h)))), h)

    return Via(run)


def half_in_place(h: Tensor) -> Tensor:
    h[:, :2].relu_()
    return h


class Case(NamedTuple):
    """A module, what is said of it, and what it is given: vectors of 6 numbers or maps of 2 × 6 × 6."""

    make: Callable[[], nn.Module]
    message: str
    maps: bool = False

    @property
    def x(self) -> Tensor:
        return torch.randn(4, 2, 6, 6) if self.maps else torch.randn(8, 6)


WHEN_MADE = {
    "no parameter": Case(lambda: nn.Tanh(), "no trainable parameter"),
    "all frozen": Case(lambda: sequential(nn.Tanh()).requires_grad_(False), "no trainable parameter"),
    "lazy": Case(lambda: nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.Linear(5, 3)), "'0' has no weights yet"),
    "scripted": Case(lambda: torch.jit.script(sequential(nn.Tanh())), r"The module is compiled by torch\.jit"),
    "traced part": Case(
        lambda: sequential(torch.jit.trace(nn.Linear(5, 5), torch.randn(2, 5))), r"'1' is compiled by torch\.jit"
    ),
    "quantising": Case(lambda: quantising(), "'0' quantises its weight"),
    "even kernel": Case(lambda: nn.Sequential(nn.Conv2d(2, 2, 2, padding="same")), "'0' has padding='same'"),
}

WHEN_RUN = {
    "layer not reached": Case(lambda: Via(lambda m, x: m.b(torch.tanh(m.a(x)))), r"layers c were not run.*Freeze"),
    "no layer reached": Case(lambda: Via(lambda m, x: x.sum(1, keepdim=True)), r"not called.*a, b, c.*Call it once"),
    "a sequence that is packed": Case(lambda: Packed(), r"weight_ih_l0.* go into lstm.*extra_points"),
    "lost on the way": Case(
        lambda: via(lambda h: torch.tensor(h.tolist())), r"no output of the shape \(B, n_L\) .*: that of a is lost"
    ),
    "no matrix for an output": Case(
        lambda: Maps(lambda m, x: m.c(x)[:, :, 0] + 0 * m.fc(x.flatten(1)).sum()),
        r"no output of the shape \(B, n_L\)",
        True,
    ),
    "mean over the batch": Case(lambda: via(lambda h: h - h.mean(0)), r"operation mean .*Freeze"),
    "maps less their mean": Case(
        lambda: Maps(lambda m, x: m.fc(((h := F.relu(m.c(x))) - h.mean(0)).flatten(1))),
        "mean gives a sample another value without the other samples",
        True,
    ),
    "order of samples": Case(lambda: via(lambda h: h.flip(0)), r"operation flip .*Freeze"),
    "samples cut apart": Case(
        lambda: Maps(lambda m, x: m.fc(F.relu(m.c(x)).permute(1, 0, 2, 3).reshape(4, 72))),
        "reshape gives a sample another value without the other samples.*cuts samples.*Write shapes with -1",
        True,
    ),
    "a batch size in a call": Case(
        lambda: via(lambda h: h + torch.roll(h.repeat(2, 1), 1, 1).split(8)[0]), "operation repeat .*Write shapes"
    ),
    "sums over the batch": Case(lambda: via(lambda h: h @ (h.T @ h)), "operation matmul .*sums over dimension 1"),
    "samples for channels": Case(
        lambda: Maps(lambda m, x: m.fc(F.conv2d(m.c(x).transpose(0, 1), torch.ones(2, 4, 1, 1)).flatten(1))),
        "operation conv2d .*for channels",
        True,
    ),
    "one sample for all": Case(lambda: via(lambda h: h + h[0]), "operation __getitem__ .*apart"),
    "noisy voltages": Case(lambda: via(lambda h: h.bernoulli()), r"random numbers in bernoulli.*nn\.Dropout"),
    "random leak": Case(lambda: sequential(nn.RReLU()), r"random numbers in rrelu.*nn\.Dropout"),
    "random slopes of maps": Case(
        lambda: Maps(lambda m, x: m.fc(F.rrelu(m.c(x), training=True).flatten(1))), "random numbers in rrelu", True
    ),
    "random dropout": Case(lambda: via(lambda h: F.alpha_dropout(h, 0.5, True)), "random numbers in alpha_dropout"),
    "complex numbers": Case(lambda: via(lambda h: h + torch.fft.fft(h).real), "complex numbers in fft_fft"),
    "straight through": Case(lambda: via(lambda h: h + (torch.sign(h) - h).detach()), r"depends on a detach\(\)"),
    "straight through by data": Case(lambda: via(lambda h: h + (torch.sign(h) - h).data), r"depends on .* \.data"),
    "a comparison": Case(lambda: via(lambda h: (h > 0).float()), "comes back to the layer 'a': .*through gt,.*Freeze"),
    "steps": Case(
        lambda: via(lambda h: torch.where(h > 0, torch.ones_like(h), torch.zeros_like(h))), "'a': .*through gt,"
    ),
    "one of n": Case(lambda: via(lambda h: torch.eye(5)[h.argmax(1)]), "'a': .*through argmax,"),
    "whole numbers": Case(lambda: via(lambda h: (10 * h).long().float()), "'a': .*through long,"),
    "sorted into bins": Case(
        lambda: via(lambda h: torch.bucketize(h, torch.linspace(-1, 1, 5)).float()), "'a': .*through bucketize,"
    ),
    "torch's own step": Case(lambda: via(lambda h: torch.heaviside(h, torch.zeros(()))), "through heaviside: .*Freeze"),
    "a comparison of maps": Case(
        lambda: Maps(lambda m, x: m.fc((m.c(x) > 0).float().flatten(1))), "'c': .*through gt,", True
    ),
    "a scripted function": Case(
        lambda: sequential(torch.jit.script(nn.Tanh())), r"comes of the layer '0' .*torch\.jit.*Freeze"
    ),
    "a scripted branch": Case(lambda: via(lambda h: h + scripted_swish(h)), r"comes of the layer 'a' .*torch\.jit"),
    "by torch.func": Case(lambda: via(lambda h: h + torch.func.vmap(torch.tanh)(h)), "comes of the layer 'a' "),
    "a view overwritten": Case(lambda: via(half_in_place), "after the operation relu_ has overwritten a view of it"),
    "moving statistics": Case(
        lambda: Normed(nn.InstanceNorm1d(4, track_running_stats=True)), "writes into a tensor from outside"
    ),
}

WHEN_TAUGHT = {
    "past the last layer": Case(lambda: after(lambda o, h: o + h[:, :3]), "'a'.* beside the network's output"),
    "gating the output": Case(lambda: after(lambda o, h: o * torch.sigmoid(h[:, :3])), "beside the network's output"),
    "beside the output": Case(lambda: after(lambda o, h: torch.cat([o, h], 1)), "beside the network's output"),
}


@pytest.mark.parametrize("name", WHEN_MADE)
def test_an_unfit_module_is_refused_when_it_is_made(name):
    with pytest.raises(ControlError, match=WHEN_MADE[name].message):
        ControlledNetwork(WHEN_MADE[name].make())


@pytest.mark.parametrize("name", WHEN_RUN)
@pytest.mark.parametrize("how", ["observed", "taught", "taught as any network"])
def test_an_unfit_pass_is_refused_when_it_is_run_and_the_module_left_alone(
    name: str, how: Literal["observed", "taught", "taught as any network"]
) -> None:
    module, x = WHEN_RUN[name].make(), WHEN_RUN[name].x
    before = {k: v.clone() for k, v in module.state_dict().items()}
    net = ControlledNetwork(module, general=how == "taught as any network")
    with pytest.raises(ControlError, match=re.compile(WHEN_RUN[name].message, re.IGNORECASE)):
        if how == "observed":
            net.observe(x)
        else:
            with net.taught_by(DFC()):
                net(x)
    assert all(len(m._forward_hooks) == len(m._forward_pre_hooks) == 0 for m in module.modules())
    assert not torch.overrides._get_current_function_mode_stack()
    assert before.keys() == module.state_dict().keys()
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_a_layer_called_again_after_the_output_is_refused():
    module = Via(lambda m, x: m.c(torch.tanh(m.b(torch.tanh(m.a(x))))) + m.c(x[:, :4]))
    for general in (False, True):
        with pytest.raises(ControlError, match=r"'c' is called twice.*call it once"):
            with ControlledNetwork(module, general=general).taught_by(DFC()):
                module(torch.randn(8, 6))


@pytest.mark.parametrize("name", WHEN_TAUGHT)
@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("seen", [False, True], ids=["first pass", "later pass"])
def test_a_loss_beside_the_output_is_refused_when_its_gradient_comes_back(name, general, seen):
    module, x = WHEN_TAUGHT[name].make(), WHEN_TAUGHT[name].x
    net = ControlledNetwork(module, general=general)
    if seen:
        net.observe(x)
    with net.taught_by(DFC()):
        loss = net(x).square().sum()
    with pytest.raises(ControlError, match=WHEN_TAUGHT[name].message):
        loss.backward()


SUPERFLUOUS: dict[str, Callable[[Tensor], Tensor]] = {
    "rounded": torch.round,
    "signs": torch.sign,
    "floor": torch.floor,
    "clamped far off": lambda h: h.clamp(10.0, 11.0),
}


@pytest.mark.parametrize("name", SUPERFLUOUS)
def test_a_derivative_that_is_zero_is_as_autograd_has_it(name):
    module = via(SUPERFLUOUS[name])
    net = ControlledNetwork(module)
    x = torch.randn(8, 6)
    with net.taught_by(Backprop()):
        loss = net(x).square().sum()
    loss.backward()
    found = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    module(x).square().sum().backward()
    assert all(torch.allclose(g, p.grad, 1e-4, 1e-6) for g, p in zip(found, module.parameters(), strict=True))
    assert not module.a.weight.grad.any() and module.c.weight.grad.any()


def learns(module: nn.Module, x: Tensor) -> bool:
    """Whether every trainable parameter is taught backprop's gradient by ``Backprop()``, and something by ``DFC()``."""
    found = {}
    for rule in (Backprop(), DFC()):
        net = ControlledNetwork(module)
        with net.taught_by(rule):
            loss = net(x).square().mean()
        loss.backward()
        found[type(rule)] = [p.grad.clone() for p in module.parameters() if p.requires_grad]
        module.zero_grad()
    module(x).square().mean().backward()
    true = [p.grad for p in module.parameters() if p.requires_grad]
    same = all(torch.allclose(g, t, 1e-4, 1e-6) for g, t in zip(found[Backprop], true, strict=True))
    return same and all(g.any() for g in found[DFC])


def frozen_script() -> nn.Module:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
    for p in scripted.parameters():
        p.requires_grad_(False)
    return nn.Sequential(scripted, *sequential(nn.Tanh()))


def pruned_for_good() -> nn.Module:
    net = sequential(nn.Tanh())
    prune.remove(prune.l1_unstructured(net[0], "weight", 0.5), "weight")
    return net


def pruned_and_frozen() -> nn.Module:
    net = sequential(nn.Tanh())
    prune.l1_unstructured(net[0], "weight", 0.5).requires_grad_(False)
    return net


REMEDIES: dict[str, Callable[[], nn.Module]] = {
    "a scripted part is frozen": frozen_script,
    "pruning is made permanent": pruned_for_good,
    "a pruned layer is frozen": pruned_and_frozen,
    "a scripted function is written in torch's": lambda: via(lambda h: h + h * torch.sigmoid(h)),
    "layers before a scripted function are frozen": lambda: frozen_before(scripted_swish),
    "layers before a comparison are frozen": lambda: frozen_before(lambda h: (h > 0).float()),
    "layers before a step are frozen": lambda: frozen_before(lambda h: torch.heaviside(h, torch.zeros(()))),
    "layers before a detach() are frozen": lambda: frozen_before(lambda h: h + (torch.sign(h) - h).detach()),
}


def frozen_before(between: Callable[[Tensor], Tensor]) -> nn.Module:
    module = via(between)
    module.a.requires_grad_(False)
    return module


@pytest.mark.parametrize("name", REMEDIES)
def test_what_the_errors_ask_for_helps(name):
    assert learns(REMEDIES[name](), torch.randn(8, 6))


def test_a_module_may_be_compiled_pruned_or_quantised_when_it_is_trained():
    module, x = sequential(nn.Tanh()), torch.randn(8, 6)
    assert learns(module, x)
    scripted = torch.jit.script(module)
    assert torch.allclose(scripted(x), module(x))
    quantised = torch.ao.quantization.quantize_dynamic(module, {nn.Linear})
    assert torch.allclose(quantised(x), module(x), atol=0.1)
    prune.l1_unstructured(module[0], "weight", 0.5)
    assert not torch.allclose(scripted(x), module(x))


@pytest.mark.parametrize("general", [False, True])
def test_no_network_can_be_known_by_an_empty_batch(general):
    net = ControlledNetwork(sequential(nn.Tanh()), general=general)
    with pytest.raises(ControlError, match=r"'0' is given no samples: .*\(0, 6\).*return None from training_step"):
        net.observe(torch.randn(0, 6))
    net.observe(torch.randn(8, 6))
    assert net.observe(torch.randn(0, 6)).batch_size == 0
