"""What can learn may change in the middle of a run: points, feedback weights and their optimizer follow."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from cases.fits import LEARNING, clusters, differing, loader, quiet, saver
from lightning.pytorch.callbacks import BackboneFinetuning, Callback
from torch import Tensor, nn

from dfc_lightning import DFC, Backprop, ControlledNetwork, DFCStrategy, FeedbackLearner, FeedbackLearning


class Pretrained(L.LightningModule):
    """A backbone and a head; of all layers the first is convolutional where ``maps`` is set."""

    def __init__(self, maps: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        first = [nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3, padding=1), nn.Flatten()] if maps else [nn.Linear(6, 12)]
        self.backbone = nn.Sequential(*first, nn.Tanh(), nn.Linear(12, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)
        self.moved: list[bool] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def on_train_epoch_start(self) -> None:
        self.start = [p.detach().clone() for p in self.backbone.parameters()]

    def on_train_epoch_end(self) -> None:
        self.moved.append(not any(map(torch.equal, self.start, self.backbone.parameters())))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 1e-2)


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("maps", [False, True], ids=["dense", "convolutional"])
def test_an_unfrozen_backbone_learns_from_then_on(maps):
    module, chosen = Pretrained(maps), DFCStrategy(DFC(), feedback=LEARNING, seed=3)
    quiet(chosen, max_epochs=4, callbacks=[BackboneFinetuning(2)]).fit(module, loader())
    assert module.moved == [False, False, True, True]
    assert len(chosen.network.feedback) == len(chosen.network.points) == 3
    assert all(q.isfinite().all() and q.any() for q in chosen.network.feedback)


def test_under_backprop_it_is_what_plain_lightning_does():
    ends = []
    for word in ("auto", DFCStrategy(rule=Backprop())):
        module = Pretrained().double()
        data = loader(clusters(dtype=torch.float64))
        quiet(word, max_epochs=4, precision="64-true", callbacks=[BackboneFinetuning(2)]).fit(module, data)
        ends.append(weights(module))
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(*ends))


class Freezes(Callback):
    def on_train_epoch_start(self, trainer: L.Trainer, module: Pretrained) -> None:
        module.backbone.requires_grad_(trainer.current_epoch < 2)


def test_a_backbone_that_is_frozen_stays_as_it_is():
    module = Pretrained()
    quiet(DFCStrategy(DFC(), feedback=LEARNING, seed=3), max_epochs=4, callbacks=[Freezes()]).fit(module, loader())
    assert module.moved == [True, True, False, False]


def test_feedback_weights_that_there_were_and_their_moments_go_on():
    module = Pretrained()
    module.backbone.requires_grad_(False)
    net = ControlledNetwork(module.backbone.append(module.head), seed=0)
    learner, x = FeedbackLearner(net, FeedbackLearning()), torch.randn(9, 6)
    for _ in range(3):
        learner.step(net.observe(x))
    of_head, moments = net.feedback[0], {k: v.clone() for k, v in learner._optimizer.state[net.feedback[0]].items()}
    before = of_head.detach().clone()
    module.backbone.requires_grad_(True)
    forward = net.observe(x)
    assert net.feedback[-1] is of_head and torch.equal(of_head, before) and len(forward.feedback) == 3
    learner.step(forward)
    after = learner._optimizer.state[of_head]
    assert after["step"] == moments["step"] + 1
    assert [learner._optimizer.state[q]["step"] for q in net.feedback[:-1]] == [1, 1]
    with net.taught_by(DFC()):
        loss = F.cross_entropy(net(x), torch.arange(9) % 3)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in module.backbone.parameters())


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_run_resumes_before_and_after_the_unfreezing(epoch, tmp_path):
    class Stops(Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, module: Pretrained) -> None:
            if trainer.current_epoch == epoch:
                raise KeyboardInterrupt

    def run(*more: Any, ckpt_path: Any = None) -> list[Tensor]:
        module, chosen = Pretrained(), DFCStrategy(DFC(), feedback=LEARNING, seed=3)
        callbacks = [BackboneFinetuning(2), saver(tmp_path), *more]
        trainer = quiet(chosen, max_epochs=5, callbacks=callbacks, enable_checkpointing=True)
        try:
            trainer.fit(module, loader(), ckpt_path=ckpt_path)
        except (KeyboardInterrupt, SystemExit):
            return []
        return [*weights(module), *(q.detach() for q in chosen.network.feedback)]

    straight = run()
    run(Stops())
    assert not differing(run(ckpt_path=tmp_path / "interrupted.ckpt"), straight)
