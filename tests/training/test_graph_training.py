"""Networks of any architecture, trained by a Trainer with DFCStrategy."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from cases.chains import close, degrees
from cases.fits import NO_FEEDBACK, SHORT, Plain, differing, loader, quiet, saver, strategy, untouched, weights
from cases.interruptions import Interrupt, raise_at, state
from cases.paths import RECIPES
from cases.processes import Rows, Witnessed, fit, furthest, trained_on_two
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dfc_lightning import DFA, DFC, Backprop, ControlError, ControlledNetwork, DFCStrategy, Expected, FeedbackLearning
from dfc_lightning.callbacks import AlignmentMonitor
from dfc_lightning.callbacks.conditions import Conditions
from dfc_lightning.data import CIFAR10, MNIST, Digits, FashionMNIST
from dfc_lightning.models import Classifier, LeNet, ResNet
from dfc_lightning.settling import Trajectory

BATCHES, BATCH = 5, 8
EVERYTHING = FeedbackLearning(method=SHORT, initial_passes=1, passes_per_epoch=1, every_n_batches=2)


def pictures(size: int = BATCHES * BATCH, seed: int = 0, dtype: torch.dtype = torch.float32) -> TensorDataset:
    """Three noisy patterns of 6x6 pixels in two colours, and which of them each picture is of."""
    patterns = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(99))
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (size,), generator=g)
    return TensorDataset((patterns[y] + torch.randn(size, 2, 6, 6, generator=g)).to(dtype), y)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 2),
        nn.GroupNorm(2, 6),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


NETS: dict[str, Callable[[], nn.Module]] = {
    "convolutional": convolutional,
    "residual, batch norm": lambda: ResNet(2, 3, blocks=1, widths=(4, 6)),
}


def module_with(net: str, lr: float = 0.01) -> Plain:
    """A LightningModule that was written for some other network."""
    module = Plain(lr=lr)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        module.net = NETS[net]()
    return module


# It learns


def small_lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def error_on_digits(make: Callable[[], nn.Module], chosen: DFCStrategy) -> float:
    torch.manual_seed(0)
    data, module = Digits(), Classifier(make(), lambda parameters: torch.optim.Adam(parameters, 3e-3))
    trainer = quiet(chosen, max_epochs=4)
    trainer.fit(module, data)
    return trainer.test(module, data, verbose=False)[0]["test/error"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "bar"),
    [(small_lenet, 25), (lambda: ResNet(1, blocks=1, widths=(8, 16)), 35)],
    ids=["LeNet", "ResNet"],
)
def test_digits_are_learned_better_than_by_dfa(make, bar):
    """In four epochs; chance is 90 %."""
    error = error_on_digits(make, DFCStrategy(seed=1))
    assert error <= bar and error <= error_on_digits(make, DFCStrategy(DFA(), seed=1))


@pytest.mark.slow
def test_torchvisions_resnet_is_trained_untouched():
    resnet18 = pytest.importorskip("torchvision.models").resnet18
    module = Plain(lambda m, batch: nn.functional.cross_entropy(m.net(batch[0]), batch[1]))
    module.net = resnet18(num_classes=10)
    learning = FeedbackLearning(initial_passes=0, passes_per_epoch=0, every_n_batches=3)
    s = DFCStrategy(DFC(), feedback=learning, seed=1)
    data = TensorDataset(torch.randn(24, 3, 32, 32), torch.arange(24) % 10)
    before = {name: p.detach().clone() for name, p in module.net.named_parameters()}
    trainer = quiet(s, max_epochs=1)
    trainer.fit(module, loader(data, 8))
    assert trainer.global_step == 3 and s.learner.steps == 1 and len(s.network.points) == 21
    for name, parameter in module.net.named_parameters():
        assert parameter.isfinite().all() and not torch.equal(parameter, before[name]), name
    assert s.lesson.settled.residual.isfinite().all() and untouched(module)


PASSES = {
    "initial": FeedbackLearning(method=SHORT, initial_passes=1, passes_per_epoch=0),
    "every epoch": FeedbackLearning(method=SHORT, initial_passes=0, passes_per_epoch=1),
    "between batches": FeedbackLearning(method=SHORT, initial_passes=0, passes_per_epoch=0, every_n_batches=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("net", NETS)
def test_all_feedback_weights_learn(net, name):
    module, s = module_with(net), strategy(feedback=PASSES[name])
    fixed = strategy(feedback=NO_FEEDBACK)
    quiet(fixed, max_epochs=1).fit(module_with(net), loader(pictures()))
    quiet(s, max_epochs=1).fit(module, loader(pictures()))
    assert s.learner.steps == (2 if name == "between batches" else BATCHES)
    for point, before, after in zip(s.network.points, fixed.network.feedback, s.network.feedback):
        assert after.isfinite().all() and not torch.equal(before, after), point.name


# Running statistics


@pytest.mark.parametrize("learning", [NO_FEEDBACK, EVERYTHING], ids=["fixed feedback", "feedback passes"])
def test_running_statistics_move_once_a_training_step_and_not_in_feedback_passes(learning):
    buffers = []
    for chosen in ("auto", strategy(feedback=learning)):
        module = module_with("residual, batch norm", lr=0.0)
        quiet(chosen).fit(module, loader(pictures()))
        buffers.append({name: b for name, b in module.net.named_buffers()})
    assert not differing(*buffers) and buffers[0]["norm.num_batches_tracked"] == 2 * BATCHES


def test_observing_leaves_buffers_as_they_are():
    module, x = module_with("residual, batch norm").net, pictures()[:][0]
    before = {name: b.clone() for name, b in module.named_buffers()}
    tensors = {name: id(b) for name, b in module.named_buffers()}
    ControlledNetwork(module).observe(x)
    assert not differing(dict(module.named_buffers()), before)
    assert {name: id(b) for name, b in module.named_buffers()} == tensors


# Checkpoints


def run(net: str, ckpt_path: Any = None, at_call: Any = None, callbacks: Any = (), **settings: Any) -> dict[str, Any]:
    module = module_with(net)
    module.at_call = at_call or module.at_call
    inner = module.step

    def counted(m: Any, batch: Any) -> Tensor:
        m.at_call(m.calls)
        m.calls += 1
        return inner(m, batch)

    module.step = counted
    trainer = quiet(strategy(feedback=EVERYTHING), callbacks=list(callbacks), **settings)
    trainer.fit(module, loader(pictures()), ckpt_path=ckpt_path)
    return state(trainer, module)


class Summed(nn.Module):
    """Dense layers that are no chain, one of them at two positions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(36, 4), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x.flatten(2))).flatten(1)
        return self.c(h + self.b(h))


NETS["dense, no chain"] = Summed


@pytest.fixture(scope="module")
def straight():
    return functools.cache(run)


WHERE = {
    "before the first pass": 0,
    "in the initial pass": 3,
    "in the first epoch": 2 * BATCHES + 3,
    "in the second epoch's pass": 3 * BATCHES + 2,
    "in the second epoch": 4 * BATCHES + 2,
}


@pytest.mark.parametrize(
    "where", [name if name == "in the first epoch" else pytest.param(name, marks=pytest.mark.slow) for name in WHERE]
)
@pytest.mark.parametrize("net", NETS)
def test_a_run_resumes_bit_for_bit(net, where, straight, tmp_path):
    with pytest.raises(Interrupt):
        run(net, at_call=raise_at(WHERE[where]), callbacks=[saver(tmp_path)], enable_checkpointing=True)
    assert not differing(run(net, tmp_path / "interrupted.ckpt"), straight(net))


def test_a_plain_trainer_goes_on_from_the_checkpoint(tmp_path):
    net = "residual, batch norm"
    trainer = quiet(strategy(), max_epochs=1)
    trainer.fit(module_with(net), loader(pictures()))
    trainer.save_checkpoint(tmp_path / "dfc.ckpt")
    module, plain = module_with(net), quiet()
    plain.fit(module, loader(pictures()), ckpt_path=tmp_path / "dfc.ckpt")
    assert plain.global_step == 2 * BATCHES and module.net.norm.num_batches_tracked == 2 * BATCHES


# What else a Trainer does


def test_two_accumulated_batches_are_one_of_twice_the_size():
    data, ends = pictures(64, dtype=torch.float64), []
    for size, settings in ((16, {}), (8, {"accumulate_grad_batches": 2})):
        module = module_with("convolutional").double()
        s = strategy(feedback=NO_FEEDBACK, feedback_init="xavier_normal")
        quiet(s, **settings).fit(module, loader(data, size))
        ends.append(weights(module))
    assert close(ends[0], ends[1], 1e-10)


def test_gradients_are_clipped():
    class Norms(Callback):
        found: ClassVar[list[float]] = []

        def on_before_zero_grad(self, trainer: Any, module: Any, optimizer: Any) -> None:
            grads = [p.grad.flatten() for p in module.net.parameters() if p.grad is not None]
            self.found.extend([float(torch.cat(grads).norm())] if grads else [])

    module = module_with("residual, batch norm")
    quiet(strategy(), gradient_clip_val=1e-3, callbacks=[Norms()]).fit(module, loader(pictures()))
    assert Norms.found and max(Norms.found) <= 1.001e-3


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "64-true"])
@pytest.mark.parametrize(("net", "accuracy"), [("convolutional", 0.7), ("residual, batch norm", 0.5)])
def test_precisions_learn(net, accuracy, precision):
    """Chance is 0.33; the second net averages over positions, which the patterns differ in."""
    module, s = module_with(net, lr=0.02), strategy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on a CPU, Lightning takes bfloat16 for 16-mixed
        trainer = quiet(s, max_epochs=15, precision=precision)
        trainer.fit(module, loader(pictures(80)), loader(pictures(100, 1), 100))
    stored = torch.float64 if precision == "64-true" else torch.float32
    assert {p.dtype for p in module.net.parameters()} == {q.dtype for q in s.network.feedback} == {stored}
    assert weights(module).isfinite().all() and trainer.callback_metrics["val_accuracy"] > accuracy


def update(net: str, dtype: torch.dtype | None) -> Tensor:
    """A DFC update in one vector, under autocast to ``dtype``."""
    module, (x, y) = module_with(net).net, pictures(64)[:]
    network = ControlledNetwork(module, feedback_init="xavier_normal", seed=0)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        with network.taught_by(DFC()) as lesson:
            loss = nn.functional.cross_entropy(network(x), y)
            lesson.watch(loss)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in module.parameters()])


@pytest.mark.parametrize("net", ["convolutional", "residual, batch norm"])
def test_an_update_under_autocast_points_where_it_would_without(net):
    """Settling is in float32; only the loss and what is normalised by it see rounded numbers, 8 bits of them."""
    assert degrees(update(net, torch.bfloat16), update(net, None)) < 1


# Alignment


@pytest.mark.slow
@pytest.mark.parametrize("rule", [DFC(), Backprop()], ids=["DFC", "backprop"])
@pytest.mark.parametrize("net", ["convolutional", "residual, batch norm"])
def test_alignment_of_a_network_that_is_no_chain(net, rule):
    rows = Rows()
    monitor = AlignmentMonitor(every_n_steps=2)
    module, s = module_with(net), strategy(rule=rule)
    quiet(s, logger=rows, callbacks=[monitor], log_every_n_steps=1).fit(module, loader(pictures()))
    found = [row for _, row in rows.rows if "alignment/backprop/total" in row]
    places = {*(f"layer_{i}" for i in range(1, len(s.network.points) + 1)), "total"}
    expected = {f"{name}/{place}" for name in ("backprop", "minimum_norm") for place in places}
    if isinstance(rule, DFC):
        expected |= {f"ssa/{place}" for place in places}
        expected |= {"condition_2", "feedback_to_transpose", "feedback_to_pseudoinverse", "condition_3"}
        expected |= {f"{name}/{place}" for name in ("control_ratio", "control_effort") for place in places}
    assert len(found) == BATCHES
    for row in found:
        values = {name.removeprefix("alignment/"): v for name, v in row.items() if name.startswith("alignment/")}
        assert values.keys() == expected and all(0 <= abs(v) < 180 for v in values.values())
        if isinstance(rule, Backprop):
            assert values["backprop/total"] < 0.1
    twin = module_with(net)
    quiet(strategy(rule=rule)).fit(twin, loader(pictures()))
    assert torch.equal(weights(twin), weights(module))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"references": ["backprop", "gauss_newton"]}, r"references=.*known for chains.*Choose of"),
        ({"tau_ratio": 0.2}, r"tau_ratio=0\.2.*known for chains.*Leave tau_ratio=None"),
    ],
    ids=["gauss_newton", "stability"],
)
def test_what_is_known_for_chains_alone_is_refused_at_the_first_step(settings, message):
    with pytest.raises(ControlError, match=message):
        quiet(strategy(), callbacks=[AlignmentMonitor(**settings)]).fit(
            module_with("convolutional"), loader(pictures())
        )


def test_the_control_ratio_is_that_of_the_apical_to_the_basal_drive():
    """Counted by hand on a convolution with a bias, its point, and on a normalisation with a shift."""
    module, (x, y) = module_with("convolutional").net, pictures()[:]
    nn.init.normal_(module[4].bias)
    network = ControlledNetwork(module, conv_feedback="channel")
    with network.taught_by(DFC()) as lesson:
        loss = nn.functional.cross_entropy(network(x), y)
    loss.backward()
    conditions = Conditions(DFC(), lesson.forward)
    conditions.update(lesson.forward, lesson.loss_grad, lesson.settled)
    found, u, qs = conditions.compute(), lesson.settled.control, [q.detach() for q in network.feedback]

    def ratio(q: Tensor, positions: int, basal: Tensor) -> float:
        return float(positions**0.5 * (u @ q.T).norm() / basal.detach().norm())

    first = nn.functional.conv2d(x, module[0].weight)
    assert abs(found["control_ratio/layer_1"] / ratio(qs[0], 16, first) - 1) < 1e-5
    heard = module[2](torch.relu(lesson.forward.v[0] + (u @ qs[0].T)[..., None, None]))
    second = module[4](module[3](heard)) - module[4].bias[:, None, None]
    assert abs(found["control_ratio/layer_2"] / ratio(qs[1], 1, second) - 1) < 1e-5


# Recipes


@pytest.mark.parametrize("rule", ["bp", "dfc", "dfa"])
@pytest.mark.parametrize(
    "task",
    [
        "mnist/lenet",
        pytest.param("fashion_mnist/lenet", marks=pytest.mark.slow),
        pytest.param("cifar10/resnet20", marks=pytest.mark.slow),
    ],
)
def test_a_recipe_builds_its_net_its_rule_and_its_data(task, rule, tmp_path, monkeypatch):
    pytest.importorskip("jsonargparse")
    from dfc_lightning.cli import RecipeCLI

    class Built(RecipeCLI):
        def _run_subcommand(self, subcommand: str) -> None:
            pass

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["dfc"])
    path = RECIPES / f"{task}_{rule}.yaml"
    assert re.search(r"Ours: (not measured yet|test error \d|docs/results.md)", path.read_text().split("\n\n")[0])
    cli = Built(["fit", f"--config={path}", "--trainer.accelerator=cpu"])
    folder, network = task.split("/")
    assert type(cli.model.network) is (LeNet if network == "lenet" else ResNet)
    assert type(cli.datamodule) is {"mnist": MNIST, "fashion_mnist": FashionMNIST, "cifar10": CIFAR10}[folder]
    assert cli.datamodule.standardize and cli.datamodule.batch_size == 128
    assert cli.trainer.log_dir == f"runs/{task}_{rule}/version_0"
    chosen = cli.trainer.strategy
    if rule == "bp":
        assert not isinstance(chosen, DFCStrategy)
    else:
        assert type(chosen.rule) is (DFA if rule == "dfa" else DFC)
        assert (chosen.feedback_init or chosen.rule.feedback.init) == (
            "xavier_normal" if rule == "dfa" else "weight_product"
        )
        assert (chosen.learning is None) == (rule == "dfa")


# Several processes


LEARNS = FeedbackLearning(method=Expected(steps=8), initial_passes=1, passes_per_epoch=1, every_n_batches=2)
SEVERAL: dict[str, dict[str, Any]] = {
    "learned": {"feedback": LEARNS},
    **{init: {"feedback": NO_FEEDBACK, "feedback_init": init} for init in ("weight_product", "jacobian")},
}


@pytest.mark.parametrize("init", ["weight_product", "jacobian"])
def test_feedback_of_a_joint_batch_is_the_mean_of_its_shares(init):
    module, x = module_with("convolutional").net.double(), pictures(80, dtype=torch.float64)[:][0]

    def start(x: Tensor) -> list[Tensor]:
        network = ControlledNetwork(module, feedback_init=init)
        network.observe(x)
        return [q.detach() for q in network.feedback]

    for joint, *shares in zip(start(x), start(x[::2]), start(x[1::2])):
        assert close(joint, sum(shares) / 2, 1e-12)


def convolutions() -> Witnessed:
    """On the six numbers of a sample, as a picture."""
    module = Witnessed()
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        module.net = nn.Sequential(
            nn.Unflatten(1, (1, 2, 3)),
            nn.Conv2d(1, 4, 2, padding=1),
            nn.GroupNorm(2, 4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 1),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(12, 3),
        )
    return module


def fitted(name: str, processes: int, joint: int | None = None) -> tuple[L.Trainer, Witnessed]:
    case = {"precision": "64-true", **SEVERAL[name]}
    return fit(case, processes, joint=joint, module=convolutions())


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return trained_on_two(fitted, SEVERAL, tmp_path_factory.mktemp("two"))


@pytest.mark.processes
@pytest.mark.parametrize("name", SEVERAL)
def test_two_processes_equal_one_on_the_joint_batch(name, two):
    worst, apart = furthest(fitted, name, two)
    assert apart <= 1e-10, worst


def test_the_closed_form_of_time_is_refused_before_training():
    module = Classifier(LeNet(size=28))
    trainer = quiet(DFCStrategy(DFC(settling=Trajectory(), integrate=True)))
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(ControlError, match=r"settling=Trajectory\(\.\.\.\) is for chains.*Euler"):
        trainer.fit(module, loader(TensorDataset(torch.randn(8, 1, 28, 28), torch.arange(8))))
    assert all(map(torch.equal, before, module.parameters()))
