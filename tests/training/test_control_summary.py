"""ControlSummary: what it says is what there is, it comes before the first update, and it changes nothing."""

from __future__ import annotations

import re
from typing import Any

import lightning as L
import pytest
import torch
from cases.fits import LEARNING, Innocent, loader
from lightning.pytorch.callbacks import ModelSummary, RichModelSummary
from torch import Tensor, nn
from torch.nn import functional as F

from dfc_lightning import DFA, DFC, Backprop, ControlledNetwork, DFCStrategy, LayeredDFC
from dfc_lightning.callbacks import ControlSummary
from dfc_lightning.training.price import price


class Convolutional(L.LightningModule):
    """2 × 8 × 8 images by Conv 2-4 with a norm, Conv 4-3, and a linear layer of 5 outputs; a head left to autograd."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 3, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(48, 5),
        )
        self.head = nn.Linear(5, 5)
        self.rates: list[Tensor] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        x = batch[0].repeat(1, 128)[:, :128].reshape(-1, 2, 8, 8)
        return F.mse_loss(self.head(self.net(x)), torch.zeros(len(x), 5))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def printed(capsys: Any, module: L.LightningModule, rule: Any, *callbacks: Any, **arguments: Any) -> str:
    settings = {"enable_model_summary": True, "max_steps": 2} | arguments.pop("trainer", {})
    if settings["enable_model_summary"] and not any(isinstance(each, ModelSummary) for each in callbacks):
        callbacks = (*callbacks, ModelSummary())
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=list(callbacks),
        strategy=DFCStrategy(rule, seed=0, **arguments),
        **settings,
    )
    trainer.fit(module, loader())
    return capsys.readouterr().out


def test_it_tells_voltages_parameters_and_ways_of_feedback_of_each_point(capsys):
    told = printed(capsys, Convolutional(), DFC(), network="net", conv_feedback="channel")
    rows = [re.split(r"\s*\|\s*", line.strip()) for line in told.splitlines() if re.match(r"\d+\s+\|", line)]
    assert rows == [
        ["0", "net.0", "Conv2d + BatchNorm2d", "4 × 6 × 6", "84", "channel", "4 × 5", "20"],
        ["1", "net.3", "Conv2d", "3 × 4 × 4", "111", "channel", "3 × 5", "15"],
        ["2", "net.6", "Linear", "5", "245", "dense", "5 × 5", "25"],
    ]
    assert re.search(r"^440 +Params taught by DFC$", told, re.M)
    assert re.search(r"^30 +Params outside, left to autograd$", told, re.M)
    assert re.search(r"^60 +Feedback weights, learned by Expected$", told, re.M)
    assert re.search(r"^0\.001 +Feedback size", told, re.M)  # 60 of 4 bytes, thrice with Adam
    assert re.search(r"^[\d.e+]+ +Time of an update, in updates by Backprop", told, re.M)


def test_layerwise_feedback_has_the_shapes_of_the_weights(capsys):
    told = printed(capsys, Convolutional(), LayeredDFC(), network="net")
    assert re.search(r"net.0 .*layered +\| 4 × 2 × 3 × 3 +\| 72", told)
    assert "learned by ExpectedMirror, then tracking the optimizer" in told


def test_rules_without_feedback_weights_have_no_columns_for_them(capsys):
    told = printed(capsys, Convolutional(), Backprop(), network="net")
    assert "Params taught by Backprop" in told and "eedback" not in told


def test_a_large_network_has_one_line_and_a_richer_trainer_a_richer_table(capsys):
    told = printed(capsys, Convolutional(), DFA(), ControlSummary(max_points=2), network="net")
    (line,) = [line for line in told.splitlines() if "control point" in line]
    assert line.startswith("3 control points: Params taught by DFA 440; ")
    assert "┃" in printed(capsys, Convolutional(), DFA(), RichModelSummary(), network="net")


def test_without_a_model_summary_there_is_none(capsys):
    assert "control" not in printed(
        capsys, Convolutional(), DFA(), network="net", trainer={"enable_model_summary": False}
    )


def test_it_comes_once_before_the_first_feedback_step_and_changes_nothing(capsys):
    seen: list[int] = []

    class Noting(ControlSummary):
        def show(self, strategy: Any, network: Any, forward: Any) -> None:
            seen.append(strategy.learner.steps)
            super().show(strategy, network, forward)

    def weights(*callbacks: Any, **settings: Any) -> Tensor:
        module = Innocent()
        printed(capsys, module, DFC(), *callbacks, feedback=LEARNING, trainer=settings)
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    assert torch.equal(weights(Noting(), ModelSummary()), weights(enable_model_summary=False))
    assert seen == [0]


def test_the_price_of_a_rule_is_its_time_by_backprops():
    net = ControlledNetwork(nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 10)), seed=0)
    forward = net.observe(torch.randn(64, 64))

    class Thrice(Backprop):
        def teach(self, forward: Any, loss_grad: Tensor) -> Any:
            for _ in range(15):
                super().teach(forward, loss_grad)
            return super().teach(forward, loss_grad)

    one, sixteen = price(Backprop(), forward), price(Thrice(), forward)
    assert one is not None and sixteen is not None and sixteen > 2 * one

    class Unwilling(Backprop):
        def teach(self, forward: Any, loss_grad: Tensor) -> Any:
            raise ValueError("not here")

    assert price(Unwilling(), forward) is None


def test_representations_tell_what_is_known():
    net = ControlledNetwork(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), seed=0)
    assert "2 control points" in repr(net) and "0: Linear, 15 parameters" in repr(net)
    assert "not made yet" in repr(net)
    net.observe(torch.randn(5, 4))
    assert "voltage 3, 15 parameters, feedback dense 3 × 2" in repr(net) and "10 feedback weights" in repr(net)
    told = repr(DFCStrategy(LayeredDFC(target_stepsize=0.25)))
    assert (
        told.startswith("DFCStrategy(rule=LayeredDFC(") and "target_stepsize=0.25" in told and "ExpectedMirror" in told
    )


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="max_points=-1"):
        ControlSummary(max_points=-1)
