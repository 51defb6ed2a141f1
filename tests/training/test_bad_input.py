"""What cannot be trained by feedback control says so, with cause and remedy, before it has changed anything."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from cases.fits import NO_FEEDBACK, Innocent, Plain, clusters, loader, quiet, strategy, untouched, weights
from cases.paths import ROOT
from torch import Tensor, nn

from dfc_lightning import (
    DFA,
    DFC,
    Backprop,
    ControlError,
    DFCStrategy,
    FeedbackLearning,
    MinimumNorm,
    StrongDFC,
    StrongSampled,
    TwoPhaseStrongDFC,
)
from dfc_lightning.settling import StrongSimulation


def refused(
    module: L.LightningModule, message: str, error: type = ControlError, word: Any = None, **settings: Any
) -> None:
    """Fit must raise ``error`` and leave weights, hooks and state_dict keys as they were."""
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(error, match=message):
        quiet(word or strategy(), **settings).fit(module, loader())
    assert untouched(module)
    after = module.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(v, after[k]) for k, v in before.items())


def cross_entropy(module: Innocent, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


# Before training


class Manual(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class TwoOptimizers(Plain):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), 0.1) for layer in (self.net[0], self.net[2])]


class FetchesItsOwn(Innocent):
    def training_step(self, dataloader_iter: Any) -> Any:
        return super().training_step(next(dataloader_iter)[0], 0)


def with_net(net: nn.Module) -> Plain:
    module = Plain()
    module.net = net
    return module


UNFIT: dict[str, tuple[Callable[[], L.LightningModule], str]] = {
    "manual optimization": (Manual, "automatic_optimization=False.*return the loss.*taught_by.*manual_backward"),
    "two optimizers": (TwoOptimizers, "returned several optimizers.*one optimizer.*taught_by.*manual_backward"),
    "dataloader_iter": (FetchesItsOwn, r"dataloader_iter.*\(batch, batch_idx\)"),
    "no control point": (lambda: with_net(nn.Tanh()), "no trainable parameter"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_refused_before_training(name):
    make, message = UNFIT[name]
    module = make()
    if isinstance(module, Innocent) and not isinstance(module, FetchesItsOwn):
        module.at_call = module.step = lambda *args: pytest.fail(f"{name} was trained")
    refused(module, message)


def test_a_wrong_network_name():
    refused(Plain(), r"network='head' is no submodule of Plain.*'net'", word=DFCStrategy(network="head"))


@pytest.mark.parametrize("word", ["dfc", DFCStrategy()])
def test_two_devices(word):
    with pytest.raises(ValueError, match=r"devices=2.*Trainer\(devices=1\)"):
        L.Trainer(accelerator="cpu", devices=2, strategy=word)


def compiled_net() -> L.LightningModule:
    module = Plain()
    module.net = torch.compile(module.net, backend="eager")
    return module


def compiled_in_place() -> L.LightningModule:
    module = Plain()
    module.net.compile(backend="eager")
    return module


def compiled_and_called() -> L.LightningModule:
    module = compiled_in_place()
    module(torch.randn(4, 6))
    return module


COMPILED = {
    "its network": compiled_net,
    "its network, in place": compiled_in_place,
    "called before": compiled_and_called,
    "as a whole": lambda: torch.compile(Plain(), backend="eager"),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name):
    module = COMPILED[name]()
    with pytest.raises(ControlError, match="compiled.*uncompiled"):
        quiet(strategy()).fit(module, loader())
    assert untouched(module)


# In the first step


def twice(module: Innocent, batch: Any) -> Tensor:
    return cross_entropy(module, batch) + cross_entropy(module, batch)


def layer_left_out(module: Innocent, batch: Any) -> Tensor:
    return F.cross_entropy(module.net[2](module.net[0](batch[0]).relu()), batch[1] % 8)


def without_grad(module: Innocent, batch: Any) -> Tensor:
    with torch.no_grad():
        return cross_entropy(module, batch)


def of_a_constant(module: Innocent, batch: Any) -> Tensor:
    module(batch[0])
    return torch.zeros(1, requires_grad=True).sum()


def of_another_loss(module: Innocent, batch: Any) -> Tensor:
    module(batch[0])
    return sum(p.square().sum() for p in module.net.parameters())


STEPS: dict[str, tuple[Callable[[Innocent, Any], Any], str]] = {
    "called twice": (twice, r"'net\.0' is called twice.*call it once"),
    "not called": (lambda m, b: b[0].sum().requires_grad_(), "not called.*Call it once in training_step"),
    "layer left out": (layer_left_out, r"net\.4 were not run.*Freeze"),
    "detached": (lambda m, b: cross_entropy(m, b).detach(), r"does not depend.*detach\(\)"),
    "detached in a dict": (lambda m, b: {"loss": cross_entropy(m, b).detach()}, r"does not depend.*detach\(\)"),
    "no_grad": (without_grad, r"does not depend"),
    "a constant": (of_a_constant, r"does not depend"),
    "not of the output": (of_another_loss, r"does not depend"),
    "detached output": (lambda m, b: F.cross_entropy(m(b[0]).detach().requires_grad_(), b[1]), r"does not depend"),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("passes", [True, False], ids=["with passes", "no passes"])
def test_refused_in_the_first_step(name, passes):
    step, message = STEPS[name]
    refused(Plain(step), message, word=strategy() if passes else strategy(feedback=NO_FEEDBACK))


def test_an_encoder_before_the_network_would_not_learn():
    module = Plain(lambda m, batch: F.cross_entropy(m.net(m.encoder(batch[0])), batch[1]))
    module.encoder = nn.Linear(6, 6)
    refused(module, r"'net\.0' wants a gradient.*detach", word=strategy(network="net", feedback=NO_FEEDBACK))
    module.encoder.requires_grad_(False)
    quiet(strategy(network="net")).fit(module, loader())


def test_a_decoder_behind_the_network_learns_by_autograd():
    """The network's output r_L is what the decoder hears; its own gradient is backprop's."""
    module = Plain(lambda m, batch: F.cross_entropy(m.decoder(torch.tanh(m.net(batch[0]))), batch[1]))
    module.decoder = nn.Linear(3, 3)
    before = module.decoder.weight.detach().clone()
    s = strategy(network="net")
    quiet(s).fit(module, loader())
    assert [p.name for p in s.network.points] == ["net.0", "net.2", "net.4"]
    assert not torch.equal(module.decoder.weight, before)


def test_what_mixes_samples_is_named():
    net = nn.Sequential(nn.Linear(6, 12), AgainstItsMean(), nn.Linear(12, 3))
    refused(with_net(net), r"operation mean .*each sample by itself.*freeze")


class AgainstItsMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


@pytest.mark.parametrize(
    "between", [nn.Dropout(0.5), nn.Softmax(1), nn.LayerNorm(12), nn.BatchNorm1d(12), nn.MaxPool1d(2)], ids=str
)
def test_what_is_not_elementwise_is_trained(between):
    module = with_net(nn.Sequential(nn.Linear(6, 12), between, nn.LazyLinear(3)))
    module.net(clusters(8)[:8][0])
    before, s = {k: v.clone() for k, v in module.named_parameters()}, strategy()
    quiet(s, max_epochs=1).fit(module, loader())
    assert all(v.isfinite().all() and not torch.equal(v, before[k]) for k, v in module.named_parameters())
    assert s.lesson.settled.converged.all() and untouched(module)


def adversarial(module: Innocent, batch: Any) -> Tensor:
    x, y = batch
    wanting = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(module(wanting), y), wanting)
    return F.cross_entropy(module(x + 0.1 * slope.sign()), y)


def penalised(module: Innocent, batch: Any) -> Tensor:
    x, y = batch
    wanting = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(module(wanting), y), wanting, create_graph=True)
    return F.cross_entropy(module(x), y) + slope.square().sum()


def test_adversarial_examples_are_made_in_the_training_step():
    plain, taught, by_dfc = (Plain(adversarial) for _ in range(3))
    quiet().fit(plain, loader())
    quiet(strategy(rule=Backprop())).fit(taught, loader())
    assert torch.allclose(weights(plain), weights(taught), 1e-4, 1e-5)
    before = weights(by_dfc)
    quiet(strategy()).fit(by_dfc, loader())
    assert not torch.allclose(weights(by_dfc), before)


def test_a_gradient_penalty_is_refused():
    refused(Plain(penalised), "whose input wants a gradient, or on that gradient")


def test_pruning_while_training_is_refused_at_the_start():
    pruning = L.pytorch.callbacks.ModelPruning("l1_unstructured", amount=0.5)
    refused(Plain(), "ModelPruning.*when the module is trained", callbacks=[pruning])


def test_the_users_own_error_comes_through():
    refused(Plain(lambda m, batch: 1 / 0), "division", ZeroDivisionError)
    refused(
        Plain(lambda m, batch: cross_entropy(m, batch) + {}["loss"]),
        "loss",
        KeyError,
        strategy(feedback=NO_FEEDBACK),
    )


def test_an_except_clause_around_the_forward_pass_does_not_swallow_a_feedback_pass():
    def careful(module: Innocent, batch: Any) -> Any:
        try:
            return cross_entropy(module, batch)
        except Exception:
            return None

    s = strategy()
    quiet(s, max_epochs=1).fit(Plain(careful), loader())
    assert s.learner.steps == 10


def test_validation_and_test_need_no_control():
    module = with_net(nn.Sequential(nn.Linear(6, 3), nn.PReLU()))
    trainer = quiet(DFCStrategy())
    assert trainer.validate(module, loader(clusters(8)), verbose=False)


# What the refusals advise


def test_the_example_for_manual_optimization_runs_and_its_discriminator_learns_by_feedback_control(monkeypatch):
    """The code of docs/manual_optimization.md, as it stands."""
    page = (ROOT / "docs" / "manual_optimization.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    taught = []
    teach = DFC.teach
    monkeypatch.setattr(DFC, "teach", lambda self, *args: taught.append(1) or teach(self, *args))
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, "docs/manual_optimization.md", "exec"), names)
    assert len(taught) == names["trainer"].fit_loop.epoch_loop.batch_progress.total.completed == 8


# Batches without samples


class Batches:
    """A loader of batches, some of them empty."""

    def __init__(self, *full: bool) -> None:
        self.full = full

    def __len__(self) -> int:
        return len(self.full)

    def __iter__(self) -> Any:
        for full, (x, y) in zip(self.full, loader()):
            yield (x, y) if full else (x[:0], y[:0])


def conv() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))


RULES: dict[str, Any] = {
    "DFC": lambda: DFCStrategy(),
    "DFC, sampled passes": strategy,
    "DFA": lambda: DFCStrategy(rule=DFA()),
    "minimum norm": lambda: DFCStrategy(rule=MinimumNorm()),
    "Strong-DFC": lambda: DFCStrategy(rule=StrongDFC(DRIVEN)),
    "Strong-DFC, two phases": lambda: strategy(
        rule=TwoPhaseStrongDFC(), feedback=FeedbackLearning(method=StrongSampled(DRIVEN))
    ),
}
DRIVEN = StrongSimulation(steps=4, sigma=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("network", [lambda: Plain().net, conv], ids=["chain", "graph"])
@pytest.mark.parametrize("full", [(True, False, True), (False, True, False, True), (True, True, False)], ids=str)
def test_an_empty_batch_teaches_nothing(name, network, full):
    module = with_net(network())
    before = [p.clone() for p in module.parameters()]
    quiet(RULES[name](), max_epochs=2).fit(module, Batches(*full))
    assert all(p.isfinite().all() and not torch.equal(p, b) for p, b in zip(module.parameters(), before))


def test_an_empty_batch_is_what_it_is_without_the_strategy():
    ends = []
    for word in ("auto", DFCStrategy(rule=Backprop())):
        module = Plain().double()
        quiet(word).fit(module, Batches64(True, False, True, False))
        ends.append(torch.cat([p.flatten() for p in module.parameters()]))
    assert (ends[0] - ends[1]).abs().max() < 1e-12


class Batches64(Batches):
    def __iter__(self) -> Any:
        return ((x.double(), y) for x, y in super().__iter__())
