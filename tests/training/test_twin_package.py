"""``pytorch_lightning`` and ``lightning`` are one library under two names, and the strategies serve both."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from cases.fits import LEARNING, Outside, clusters, differing, loader, quiet, saver, weights
from test_resume import Interrupt, raise_at
from torch import nn

pl = pytest.importorskip("pytorch_lightning", minversion="2.5")

from dfc_lightning import DFC, ControlError, DFCDDPStrategy, DFCStrategy  # noqa: E402
from dfc_lightning.callbacks import FeedbackMonitor, SettlingMonitor  # noqa: E402


def module_of(package: Any) -> Any:
    """A module whose base is of the package of this name."""

    class Model(package.LightningModule):
        calls = Outside(int)

        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng([]):
                torch.manual_seed(0)
                self.net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
            self.calls, self.at_call = 0, lambda call: None

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.at_call(self.calls)
            self.calls += 1
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss, on_step=False, on_epoch=True)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), 0.01)
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}

    return Model()


def trainer_of(package: Any, strategy: Any, **settings: Any) -> Any:
    if package is L:
        return quiet(strategy, **settings)
    defaults = dict(max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, devices=1)
    quietly = dict(enable_model_summary=False, accelerator="cpu", num_sanity_val_steps=0)
    return pl.Trainer(strategy=strategy, **(defaults | quietly | settings))


def trained(package: Any, strategy: Any = None, ckpt_path: Any = None, fail_at: int = -1, **settings: Any) -> Any:
    module = module_of(package)
    module.at_call = raise_at(fail_at)
    trainer = trainer_of(package, strategy or DFCStrategy(DFC(), feedback=LEARNING, seed=7), **settings)
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return trainer, module


def state(trainer: Any, module: Any) -> Any:
    s = trainer.strategy
    return [module.state_dict(), s.network.state_dict(), s.learner.state_dict(), s.optimizers[0].state_dict()]


@pytest.fixture(scope="module")
def straight() -> Any:
    return state(*trained(L))


def test_both_names_train_alike(straight):
    assert not differing(state(*trained(pl)), straight)


@pytest.mark.parametrize("first", [L, pl], ids=["from lightning", "from pytorch_lightning"])
@pytest.mark.parametrize("call", [2, 12])
def test_a_run_goes_on_under_the_other_name(first, call, straight, tmp_path):
    from pytorch_lightning.callbacks import OnExceptionCheckpoint

    keep = saver(tmp_path) if first is L else OnExceptionCheckpoint(tmp_path, "interrupted")
    with pytest.raises(Interrupt):
        trained(first, fail_at=call, callbacks=[keep], enable_checkpointing=True)
    second = pl if first is L else L
    assert not differing(state(*trained(second, ckpt_path=str(tmp_path / "interrupted.ckpt"))), straight)


def test_names_and_objects_are_known_to_both_trainers():
    for package in (L, pl):
        for word in ("dfc", DFCStrategy()):
            trainer, module = trained(package, word)
            assert isinstance(trainer.strategy, DFCStrategy) and trainer.global_step == 10
            assert not torch.equal(weights(module), weights(module_of(package)))
        for word in ("dfc_ddp", DFCDDPStrategy(process_group_backend="gloo")):
            assert isinstance(trainer_of(package, word, devices=2).strategy, DFCDDPStrategy)
    assert trainer_of(pl, "dfc_ddp_spawn", devices=2).strategy._start_method == "spawn"


def test_one_object_serves_one_trainer_after_the_other():
    s = DFCStrategy(DFC(), feedback=LEARNING, seed=7)
    for package in (pl, L, pl):
        s._accelerator = None  # which trainers leave in it, and take for a wish
        trained(package, s)
        assert s.learner.steps == 15


@pytest.mark.skipif(
    pl.__version__.startswith("2.5"), reason="before 2.6 a trainer takes callbacks of its own name only"
)
def test_monitors_work_in_a_trainer_of_the_other_name():
    trained(pl, callbacks=[SettlingMonitor(), FeedbackMonitor()])


def test_refusals_are_the_same():
    module = module_of(pl)
    module.automatic_optimization = False
    with pytest.raises(ControlError, match="automatic_optimization=False"):
        trainer_of(pl, DFCStrategy()).fit(module, loader())
    with pytest.raises(ValueError, match=r"devices=2 is not possible with DFCStrategy"):
        trainer_of(pl, DFCStrategy(), devices=2)


def test_time_and_steps_bound_passes_there_too():
    trainer, module = trained(pl, max_steps=3)
    assert trainer.strategy.learner.steps == 3 + 3
    module.at_call = lambda call: torch.zeros(1)
    started = trainer_of(pl, DFCStrategy(), max_time={"seconds": 0}, max_epochs=1)
    started.fit(module_of(pl), loader())
    assert started.strategy.learner is None or started.strategy.learner.steps <= 1


ORDERS = {
    "theirs first": "import pytorch_lightning as pl\nimport dfc_lightning",
    "ours first": "import dfc_lightning\nimport pytorch_lightning as pl",
    "theirs never": "import dfc_lightning, sys\nassert 'pytorch_lightning' not in sys.modules\nraise SystemExit",
}


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_in_either_order_of_imports(order):
    ask = "print(type(pl.Trainer(strategy='dfc', accelerator='cpu', logger=False).strategy).__name__)"
    run = subprocess.run([sys.executable, "-c", f"{ORDERS[order]}\n{ask}"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == ("" if order == "theirs never" else "DFCStrategy")


@pytest.mark.processes
def test_started_by_spawn_under_the_other_name():
    module = Spawned()
    s = DFCDDPStrategy(DFC(), feedback=LEARNING, seed=3, start_method="spawn")
    trainer_of(pl, s, devices=2, max_epochs=1).fit(module, loader(clusters(64)))
    assert not torch.equal(weights(module), weights(Spawned()))


class Spawned(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)
