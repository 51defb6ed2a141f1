"""What is timed: the networks and settings of the recipes, on synthetic data with classes in it."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfc_lightning import (
    DFC,
    ControlledNetwork,
    Expected,
    FeedbackLearner,
    FeedbackLearning,
    LearningRule,
    PIController,
    Sampled,
)
from dfc_lightning.experiments.composition import compose
from dfc_lightning.models import MLP
from dfc_lightning.network.initial_feedback import FeedbackInit
from dfc_lightning.settling import SteadyState

RECIPES = Path(__file__).parent.parent / "recipes"
Loss = Callable[[Tensor, Tensor], Tensor]


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Options of the problem's size."""
    parser.add_argument("--batch", default=128, type=int, help="batch size")
    parser.add_argument("--inputs", default=784, type=int, help="entries of a sample")
    parser.add_argument("--hidden", default=256, type=int, help="units of a hidden layer")


@dataclass
class Problem:
    """A network with feedback weights, a batch, and a loss."""

    network: ControlledNetwork
    x: Tensor
    y: Tensor
    loss: Loss

    def update(self, rule: LearningRule | None) -> Any:
        """Forward pass, loss, and backward with ``.grad`` written; by plain backprop if ``rule`` is None.

        Returns:
            What the rule settled to, where it settles.
        """
        for p in self.network.module.parameters():
            p.grad = None
        if rule is None:
            self.loss(self.network(self.x), self.y).backward()
            return None
        with self.network.taught_by(rule) as lesson:
            loss = self.loss(self.network(self.x), self.y)
        loss.backward()
        return lesson.settled

    def gradient(self, rule: LearningRule | None) -> Tensor:
        """All of ``.grad`` after an update, in one vector."""
        self.update(rule)
        return torch.cat([p.grad.flatten() for p in self.network.module.parameters() if p.grad is not None])

    def to(self, dtype: torch.dtype) -> Problem:
        """The same problem in another dtype."""
        network = ControlledNetwork(copy.deepcopy(self.network.module).to(dtype), general=self.network.general)
        network.load_state_dict({name: q.to(dtype) for name, q in self.network.state_dict().items()})
        y = self.y.to(dtype) if self.y.is_floating_point() else self.y
        return replace(self, network=network, x=self.x.to(dtype), y=y)

    def recorded(self) -> Problem:
        """The same problem, its network treated as one of any shape: without the closed forms of a dense chain."""
        network = ControlledNetwork(self.network.module, general=True)
        network.load_state_dict(self.network.state_dict())
        return replace(self, network=network)

    def float32_error(self, rule: LearningRule | None) -> float:
        """‖g₃₂ − g₆₄‖ / ‖g₆₄‖ of the update in float32 and in float64, from the same float32 numbers."""
        low = self.to(torch.float32)
        single, double = low.gradient(rule).double(), low.to(torch.float64).gradient(rule)
        return float((single - double).norm() / double.norm())


@dataclass(frozen=True)
class Settings:
    """The settings of a recipe that a benchmark needs."""

    sizes: list[int]
    nonlinearity: str | list[str]
    controller: PIController
    target_stepsize: float
    feedback_init: FeedbackInit
    feedback: FeedbackLearning
    optimizer: dict[str, Any]
    reconstructs: bool

    @classmethod
    def load(cls, name: str, options: argparse.Namespace) -> Settings:
        """Settings of ``recipes/<name>.yaml``, its layers of 784 and 256 units as wide as the options say."""
        widths = {784: options.inputs, 256: options.hidden}
        tree = compose(RECIPES / f"{name}.yaml")
        strategy, model = tree["trainer"]["strategy"]["init_args"], tree["model"]["init_args"]
        rule, net = strategy["rule"]["init_args"], model["network"]["init_args"]
        feedback = dict(strategy["feedback"])
        feedback["method"] = Sampled(**feedback["method"]["init_args"])
        return cls(
            [widths.get(n, n) for n in net["sizes"]],
            net["nonlinearity"],
            PIController(**rule["controller"]),
            rule["target_stepsize"],
            strategy["feedback_init"],
            FeedbackLearning(**feedback),
            model["optimizer"]["init_args"],
            tree["model"]["class_path"].endswith("Autoencoder"),
        )

    def dfc(self, settling: Any, integrate: bool = False) -> DFC:
        """DFC with this controller and target."""
        return DFC(settling, self.controller, self.target_stepsize, integrate=integrate)

    @property
    def sampled(self) -> Sampled:
        """The recipe's feedback learning, by simulation."""
        assert isinstance(self.feedback.method, Sampled)
        return self.feedback.method

    @property
    def expected(self) -> Expected:
        """Its expectation over the noise."""
        return Expected(**asdict(self.sampled))

    def problem(
        self, batch: int, dtype: torch.dtype, device: str, feedback_init: FeedbackInit = "weight_product"
    ) -> Problem:
        """A fresh network and a batch; equal arguments give equal numbers."""
        torch.manual_seed(0)
        module = MLP(self.sizes, self.nonlinearity).to(device, dtype)
        x, y = next(self.batches(batch, dtype, device))
        network = ControlledNetwork(module, feedback_init=feedback_init, seed=0)
        network.observe(x)  # finds the nonlinearities: not part of later passes
        return Problem(network, x, y, F.mse_loss if self.reconstructs else F.cross_entropy)

    def batches(self, size: int, dtype: torch.dtype, device: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless seeded batches: overlapping clusters in 16 dimensions, one a class, through a random tanh layer."""
        g = torch.Generator().manual_seed(1)
        inputs, classes = self.sizes[0], 10 if self.reconstructs else self.sizes[-1]
        centres = 0.8 * torch.randn(classes, 16, generator=g)
        decoder = torch.randn(16, inputs, generator=g) / 2
        while True:
            labels = torch.randint(classes, (size,), generator=g)
            hidden = centres[labels] + torch.randn(size, 16, generator=g)
            x = torch.tanh(hidden @ decoder) + 0.3 * torch.randn(size, inputs, generator=g)
            x = x.to(device, dtype)
            yield x, (x if self.reconstructs else labels.to(device))

    def trained(self, problem: Problem, steps: int) -> Problem:
        """Train a problem's network by DFC-SS as the recipe does, a feedback step before each; its batch stays.

        Feedback learns by the expected update and with ten times the recipe's rate, being given so few steps.
        """
        feedback = replace(self.feedback, method=self.expected, lr=10 * self.feedback.lr)
        learner = FeedbackLearner(problem.network, feedback)
        optimizer = torch.optim.Adam(problem.network.module.parameters(), **self.optimizer)
        batches = self.batches(len(problem.x), problem.x.dtype, str(problem.x.device))
        next(batches)  # the problem's own
        rule = self.dfc(SteadyState())
        for _, (x, y) in zip(range(steps), batches):
            learner.step(problem.network.observe(x))
            replace(problem, x=x, y=y).update(rule)
            optimizer.step()
        return problem
