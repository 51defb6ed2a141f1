"""Runs that are broken off, and the checkpoints they leave."""

from __future__ import annotations

import os
import signal
from typing import Any

import lightning as L
import pytest

from cases.fits import BATCHES, LEARNING, Innocent, clusters, loader, quiet, saver, strategy
from dfc_lightning import DFCStrategy

EPOCHS = 3
PASS = BATCHES  # training_step is called once a batch, in feedback passes too


class Interrupt(Exception):
    pass


def raise_at(k: int):
    def act(call: int) -> None:
        if call == k:
            raise Interrupt

    return act


def sigterm_at(k: int):
    def act(call: int) -> None:
        if call == k:
            os.kill(os.getpid(), signal.SIGTERM)

    return act


def state(trainer: L.Trainer, module: Innocent) -> dict[str, Any]:
    """Everything a run has learned: weights, Q, both optimizers, schedulers, counters."""
    s = trainer.strategy
    assert isinstance(s, DFCStrategy)
    return {
        "weights": module.state_dict(),
        "feedback": s.network.state_dict(),
        "optimizer": s.optimizers[0].state_dict(),
        "learner": s.learner.state_dict(),
        "stages": s.stages.progress.state_dict(),
        "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict()["last_epoch"],
        "lr": s.optimizers[0].param_groups[0]["lr"],
        "steps": (trainer.global_step, trainer.current_epoch),
    }


def run(
    ckpt_path=None,
    at_call=None,
    callbacks=(),
    data=None,
    val=False,
    learning=LEARNING,
    seed=7,
    feedback_init=None,
    module=None,
    **settings,
):
    module = module or Innocent()
    if at_call is not None:
        module.at_call = at_call
    s = strategy(feedback=learning, seed=seed, feedback_init=feedback_init)
    trainer = quiet(s, **(dict(max_epochs=EPOCHS, callbacks=list(callbacks)) | settings))
    loaders = data if data is not None else loader()
    trainer.fit(module, loaders, loader(clusters(16, 5)) if val else None, ckpt_path=ckpt_path)
    return state(trainer, module)


def interrupted(tmp_path, error=Interrupt, **settings) -> str:
    """Run until ``error``; the checkpoint it leaves behind."""
    with pytest.raises(error):
        run(callbacks=[saver(tmp_path), *settings.pop("callbacks", ())], enable_checkpointing=True, **settings)
    return str(tmp_path / "interrupted.ckpt")
