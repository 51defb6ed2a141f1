"""``Trainer(accelerator="gpu")``: as on the CPU, in mixed precision, resumed, on two processes, and what it leaves."""

from __future__ import annotations

import gc
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.fits import BATCHES, Innocent, clusters, differing, loader, quiet, strategy, untouched, weights
from cases.graphs import NETWORKS
from cases.interruptions import Interrupt, raise_at, state
from cases.processes import SAMPLED, Dealt, Witnessed, digest, distance, learned, on_all, spawn
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.callbacks import Callback, OnExceptionCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from dfc_lightning import (
    DFA,
    DFC,
    Backprop,
    ControlledNetwork,
    DFCDDPStrategy,
    DFCStrategy,
    DifferenceTargetPropagation,
    Expected,
    FeedbackAlignment,
    FeedbackLearning,
    ForwardGradient,
    KolenPollack,
    LayeredDFC,
    LeastControl,
    MinimumNorm,
    PredictiveCoding,
    Sampled,
    SignSymmetry,
    WeightMirror,
)
from dfc_lightning.settling import Euler, Linearized

pytestmark = pytest.mark.cuda

EXPECTED = FeedbackLearning(method=Expected(steps=8), initial_passes=1, passes_per_epoch=1, every_n_batches=2)
DRAWN = FeedbackLearning(method=Sampled(steps=6), initial_passes=1, passes_per_epoch=1)
FITS: dict[str, dict[str, Any]] = {
    "steady state, expected feedback": dict(rule=DFC(), feedback=EXPECTED),
    "steady state, sampled feedback": dict(rule=DFC(), feedback=DRAWN),
    "linearised": dict(rule=DFC(Linearized()), feedback=EXPECTED),
    "simulated": dict(rule=DFC(Euler(steps=30), integrate=True), feedback=EXPECTED),
    "default": dict(),
    "layered, mirror and tracking": dict(rule=LayeredDFC()),
    "minimum norm": dict(rule=MinimumNorm()),
    "DFA": dict(rule=DFA()),
    "FA": dict(rule=FeedbackAlignment()),
    "Kolen-Pollack": dict(rule=KolenPollack()),
    "weight mirror": dict(rule=WeightMirror()),
    "difference targets": dict(rule=DifferenceTargetPropagation()),
    "least control": dict(rule=LeastControl()),
    "predictive coding": dict(rule=PredictiveCoding()),
    "signs": dict(rule=SignSymmetry("batch_random")),
    "forward gradient": dict(rule=ForwardGradient()),
}


def fit(accelerator: str, precision: Any, module: Any = None, trainer: Any = None, **settings: Any) -> Innocent:
    """What is trained, two epochs long."""
    module = module or Innocent()
    dtype = torch.float64 if precision == "64-true" else torch.float32
    made = quiet(
        DFCStrategy(**(dict(seed=7) | settings)), accelerator=accelerator, precision=precision, **trainer or {}
    )
    made.fit(module, loader(clusters(dtype=dtype)), loader(clusters(16, 5, dtype)))
    return module


@pytest.mark.parametrize("name", FITS)
def test_a_fit_ends_where_it_does_on_the_cpu(name: str, accelerator: str, host_draws: None) -> None:
    begin = weights(Innocent().double())
    here, there = (weights(fit(where, "64-true", **FITS[name])).cpu() for where in ("cpu", accelerator))
    assert (here - begin).norm() > 1e-2
    assert (there - here).norm() < 1e-6 * (here - begin).norm()


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("name", ["steady state, expected feedback", "default", "Kolen-Pollack"])
def test_mixed_precision_learns(name: str, precision: Any, accelerator: str) -> None:
    module = Innocent(lr=0.02)
    trainer = quiet(
        DFCStrategy(**(dict(seed=7) | FITS[name])), accelerator=accelerator, precision=precision, max_epochs=15
    )
    trainer.fit(module, loader(clusters(80), shuffle=True), loader(clusters(200, seed=1), 200))
    assert trainer.callback_metrics["val_accuracy"] > 0.8
    assert torch.isfinite(weights(module)).all() and untouched(module)
    assert {q.dtype for q in trainer.strategy.network.feedback} <= {torch.float32}


def test_a_scaler_that_overflows_skips_steps_and_then_learns(accelerator: str, device: torch.device) -> None:
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**22)
    moved: list[bool] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
            self.before = weights(module)

        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            moved.append(not torch.equal(weights(module), self.before))

    module = Innocent()
    plugin = MixedPrecision("16-mixed", device.type, scaler)
    quiet(strategy(), accelerator=accelerator, plugins=plugin, callbacks=[Watch()], max_epochs=3).fit(module, loader())
    assert not moved[0] and all(moved[moved.index(True) :])
    assert torch.isfinite(weights(module)).all()


# Resuming


@pytest.mark.parametrize("call", [3, BATCHES + 2, 2 * BATCHES + 3])
@pytest.mark.parametrize("name", ["steady state, sampled feedback", "default"])
def test_a_run_that_is_broken_off_goes_on_bit_for_bit(name: str, call: int, accelerator: str, tmp_path: Path) -> None:
    def run(at: int | None = None, path: str | None = None) -> dict[str, Any]:
        module = Innocent()
        if at is not None:
            module.at_call = raise_at(at)
        trainer = quiet(
            DFCStrategy(**(dict(seed=7) | FITS[name])),
            accelerator=accelerator,
            callbacks=[OnExceptionCheckpoint(tmp_path, "interrupted")],
            enable_checkpointing=True,
        )
        trainer.fit(module, loader(shuffle=False), ckpt_path=path)
        return state(trainer, module)

    with pytest.raises(Interrupt):
        run(at=call)
    assert not differing(run(path=str(tmp_path / "interrupted.ckpt")), run())


# The host and the memory


@pytest.mark.parametrize("net", ["chain", "residual"])
@pytest.mark.parametrize("rule", [Backprop(), DFA(), FeedbackAlignment(), KolenPollack(), SignSymmetry()], ids=repr)
def test_an_update_does_not_wait_for_the_device(rule: Any, net: str, device: torch.device) -> None:
    make, shape = NETWORKS["residual"] if net == "residual" else (lambda: Innocent().net, (6,))
    module, y = make().to(device), torch.arange(8, device=device) % 3
    controlled, x = ControlledNetwork(module, seed=0), torch.randn(8, *shape, device=device)

    def step() -> None:
        with controlled.taught_by(rule):
            loss = F.cross_entropy(controlled(x), y)
        loss.backward()

    step(), step()
    if device.type != "cuda":
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not [f"{w.filename}:{w.lineno}" for w in told if "synchroniz" in str(w.message)]


def test_a_fit_leaves_no_memory_behind(accelerator: str, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("there is none to count")
    held = []
    for _ in range(3):
        fit(accelerator, "32-true", **FITS["steady state, expected feedback"]).cpu()
        gc.collect()
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held[2] <= held[1] + 2**16


# Two processes


class SharedGPU(CUDAAccelerator):
    """One GPU for all processes, where Lightning would want one for each."""

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        return [0] * int(devices)

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        return [torch.device("cuda", k) for k in devices]


def two(backend: str, on: str, rank: int, processes: int, folder: str) -> None:
    trainer, module = dealt(on, processes, backend)
    assert len(set(on_all(digest(on_host(learned(trainer, module)))))) == 1, "ranks differ"
    if rank == 0:
        torch.save(on_host(learned(trainer, module)), Path(folder, "learned.pt"))


def on_host(found: Any) -> Any:
    if isinstance(found, Tensor):
        return found.detach().cpu()
    if isinstance(found, dict):
        return {k: on_host(v) for k, v in found.items()}
    return type(found)(map(on_host, found)) if isinstance(found, (list, tuple)) else found


def dealt(on: str, processes: int, backend: str | None) -> tuple[Any, Any]:
    """Trained on so many processes, or by one on what is dealt out to two."""
    chosen: Any = DFCStrategy(DFC(), SAMPLED, seed=3)
    if processes > 1:
        chosen = DFCDDPStrategy(DFC(), SAMPLED, seed=3, process_group_backend=backend)
    shared = SharedGPU() if torch.cuda.device_count() < processes else CUDAAccelerator()
    accelerator = shared if on == "cuda" else CPUAccelerator()
    trainer = quiet(
        chosen, accelerator=accelerator, devices=processes, precision="64-true", use_distributed_sampler=False
    )
    module = Witnessed(unequal=processes > 1)  # DDP takes the first process's weights
    trainer.fit(module, Dealt(clusters(80, dtype=torch.float64), False, False, 2 if processes == 1 else None))
    return trainer, module


@pytest.mark.processes
@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_two_processes_equal_one(backend: str, device: torch.device, tmp_path: Path) -> None:
    if backend == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL wants a GPU for each process")
    spawn(partial(two, backend, device.type), 2, tmp_path)
    apart = distance(on_host(learned(*dealt(device.type, 1, None))), torch.load(tmp_path / "learned.pt"))
    assert max(apart.values()) < 1e-6
