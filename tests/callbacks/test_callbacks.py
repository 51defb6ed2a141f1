"""``AlignmentMonitor`` sees what the optimizer gets, and leaves training alone."""

from __future__ import annotations

import csv
import math
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from cases.fits import BATCH, BATCHES, NO_FEEDBACK, Innocent, Plain, clusters, loader, quiet, strategy, weights
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn

from dfc_lightning import DFA, DFC, Backprop, ControlError, DFCDDPStrategy, DFCStrategy, MinimumNorm
from dfc_lightning.callbacks import AlignmentMonitor, FeedbackMonitor, SettlingMonitor
from dfc_lightning.metrics import update_angle
from dfc_lightning.settling import Euler, Linearized


class Notebook(Logger):
    """A logger that keeps what it is given under ``alignment/``, by step."""

    name, version = "notebook", "0"

    def __init__(self) -> None:
        super().__init__()
        self.pages: dict[int, dict[str, float]] = {}

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        kept = {k.removeprefix("alignment/"): v for k, v in metrics.items() if k.startswith("alignment/")}
        if kept:
            assert step not in self.pages
            self.pages[step] = kept


def watched(
    monitor: AlignmentMonitor | None, rule: Any = None, data: Any = None, module: Any = None, **settings: Any
) -> tuple[dict[int, dict[str, float]], torch.Tensor]:
    notebook, module = Notebook(), module or Innocent()
    callbacks = [*([monitor] if monitor else []), *settings.pop("callbacks", [])]
    trainer = quiet(strategy(rule=rule), logger=notebook, callbacks=callbacks, log_every_n_steps=1, **settings)
    trainer.fit(module, loader(data))
    return notebook.pages, weights(module)


ANGLES = [
    f"{r}/{p}" for r in ("backprop", "gauss_newton", "minimum_norm", "ssa") for p in ("layer_1", "layer_3", "total")
]
CONDITIONS = ["condition_1", "condition_2", "feedback_to_transpose", "feedback_to_pseudoinverse", "condition_3"]


def test_finite_angles_are_logged_at_the_right_steps():
    pages, _ = watched(AlignmentMonitor(every_n_steps=3, tau_ratio=0.2), max_epochs=2)
    assert list(pages) == [k for k in range(1, 2 * BATCHES + 1) if k % 3 == 0]
    for page in pages.values():
        assert all(math.isfinite(value) for value in page.values())
        assert {*ANGLES, *CONDITIONS, "stability", "control_ratio/layer_2", "control_ratio/total"} <= set(page)
        assert 0 < page["backprop/total"] < 90
        assert page["condition_3"] < 0 and 0 < page["condition_2"] <= 1


def test_csv_is_enough(tmp_path):
    logger = CSVLogger(tmp_path)
    quiet(strategy(), logger=logger, callbacks=[AlignmentMonitor(2)]).fit(Innocent(), loader())
    logger.save()
    assert "alignment/minimum_norm/total" in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()


@pytest.mark.parametrize(
    ("rule", "reference"),
    [(Backprop(), "backprop"), (DFC(settling=Linearized()), "ssa"), (MinimumNorm(damping=0.1), "minimum_norm")],
    ids=["backprop", "ssa", "minimum_norm"],
)
def test_a_rule_is_aligned_with_itself_and_with_no_other(rule, reference):
    pages, _ = watched(AlignmentMonitor(1), rule, max_epochs=1)
    for page in pages.values():
        own = [page[f"{reference}/{part}"] for part in ("layer_1", "layer_2", "layer_3", "total")]
        known = [name for name in ANGLES if rule.feedback is not None or not name.startswith("ssa")]
        others = [page[name] for name in known if name.endswith("total") and not name.startswith(reference)]
        assert any(name.startswith("ssa") for name in page) == (rule.feedback is not None)
        assert own == [0.0] * 4 and min(others) > 0.1
    assert ("condition_2" in page) == ("control_ratio/total" in page) == isinstance(rule, DFC)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    [None, DFA(), DFC(settling=Euler(steps=20, dt=0.1, tau_ratio=0.2), integrate=True), DFC(clamped=True)],
    ids=["dfc", "dfa", "time-integrated", "clamped"],
)
def test_it_changes_nothing(rule):
    torch.manual_seed(3)
    _, without = watched(None, rule)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    pages, with_it = watched(AlignmentMonitor(1, tau_ratio=0.2), rule)
    assert len(pages) == 2 * BATCHES
    assert torch.equal(with_it, without) and torch.equal(torch.get_rng_state(), after)


def test_no_second_training_step():
    alone, seen = Innocent(), Innocent()
    watched(None, module=alone)
    watched(AlignmentMonitor(1), module=seen)
    assert seen.calls == alone.calls


def test_it_does_nothing_when_idle(monkeypatch):
    monkeypatch.setattr(DFC, "teach", counted := Counted(DFC.teach))
    watched(AlignmentMonitor(every_n_steps=1000))
    assert counted.calls == 2 * BATCHES


class Counted:
    def __init__(self, function: Any) -> None:
        self.function, self.calls = function, 0

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        def call(*args: Any) -> Any:
            self.calls += 1
            return self.function(instance, *args)

        return call


class Grads(Callback):
    """Notes the gradients that the optimizer is about to see."""

    def __init__(self) -> None:
        self.seen: list[list[torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.seen.append([p.grad.clone() for p in module.net.parameters() if p.grad is not None])


def layers(grads: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    return [grads[k : k + 2] for k in range(0, len(grads), 2)]


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str)
def test_it_compares_what_the_optimizer_gets(settings):
    """The first step's angle to backprop is the one between the gradients two trainers leave in ``.grad``."""
    grads = {}
    for name, rule in (("dfc", DFC()), ("backprop", Backprop())):
        grads[name] = Grads()
        pages, _ = watched(AlignmentMonitor(1), rule, callbacks=[grads[name]], max_epochs=1, **settings)
        if name == "dfc":
            angles = pages[1]
    expected = update_angle(*(layers(grads[name].seen[0]) for name in ("dfc", "backprop")))
    for layer, angle in expected.items():
        assert abs(angles[f"backprop/{layer}"] - float(angle)) < (0.5 if "precision" in settings else 1e-2)
    steps = BATCHES if "accumulate_grad_batches" not in settings else (BATCHES + 1) // 2
    assert list(pages) == list(range(1, steps + 1))


def summed(module: Any, batch: Any) -> Any:
    return F.cross_entropy(module(batch[0]), batch[1], reduction="sum")


@pytest.mark.parametrize(
    ("reduction", "step", "size", "accumulate"),
    [("mean", None, 4, 2), ("sum", summed, 4, 2), ("sum", summed, 3, 3)],
    ids=["mean", "sum", "sum of unequal batches"],
)
def test_accumulated_batches_count_as_the_whole(reduction, step, size, accumulate):
    data, pages = clusters(BATCH, dtype=torch.float64), []
    for batch_size, together in ((BATCH, 1), (size, accumulate)):
        notebook = Notebook()
        trainer = quiet(
            strategy(rule=DFC(settling=Linearized()), loss_reduction=reduction, feedback=NO_FEEDBACK),
            logger=notebook,
            callbacks=[AlignmentMonitor(1, ["backprop", "gauss_newton", "minimum_norm"], tau_ratio=0.2)],
            accumulate_grad_batches=together,
            max_epochs=3,
        )
        trainer.fit(Plain(step).double(), loader(data, batch_size))
        pages.append(notebook.pages)
    assert list(pages[0]) == [1, 2, 3] and agree(*pages)


def agree(a: dict[int, dict[str, float]], b: dict[int, dict[str, float]]) -> bool:
    """Whether two logs are the same to rounding."""
    return a.keys() == b.keys() and all(
        a[step].keys() == b[step].keys() and all(math.isclose(a[step][k], b[step][k], rel_tol=1e-7) for k in a[step])
        for step in a
    )


class Portable(L.LightningModule):
    """Can be sent to another process."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.5)


@pytest.mark.processes
def test_two_processes_log_what_one_does_on_the_joint_batch(tmp_path):
    settings = dict(rule=DFC(settling=Linearized()), feedback=NO_FEEDBACK, seed=7)
    logs = []
    for ranks, word in ((1, DFCStrategy(**settings)), (2, DFCDDPStrategy(**settings, start_method="spawn"))):
        logger = CSVLogger(tmp_path, name="", version=str(ranks))
        monitor = AlignmentMonitor(2, ["backprop", "gauss_newton", "minimum_norm"], tau_ratio=0.2)
        monitors = [monitor, SettlingMonitor(2), FeedbackMonitor(2)]
        trainer = quiet(word, logger=logger, devices=ranks, precision="64-true", callbacks=monitors, max_epochs=4)
        trainer.fit(Portable(), loader(clusters(2 * BATCH, dtype=torch.float64), 2 * BATCH // ranks))
        with open(tmp_path / str(ranks) / "metrics.csv") as file:
            rows = list(csv.DictReader(file))
        seen = ("alignment/", "settling/residual_", "settling/un", "settling/control", "feedback_weights/")
        log: dict[int, dict[str, float]] = {}
        for row in rows:
            found = {name: float(value) for name, value in row.items() if value and name.startswith(seen)}
            if found:
                log.setdefault(int(row["step"]), {}).update(found)
        logs.append(log)
        assert {"settling/residual_max", "feedback_weights/norm/layer_1"} <= set(logs[-1][4])
    assert list(logs[0]) == [2, 4] and agree(*logs)


def test_wide_outputs_leave_out_what_is_dear():
    torch.manual_seed(0)
    wide = Plain(lambda module, batch: module(batch[0]).square().mean())
    wide.net[4] = nn.Linear(8, 70)
    pages, _ = watched(AlignmentMonitor(1), module=wide, max_epochs=1)
    cheap = {"backprop", "ssa", "condition_1", "control_ratio", "control_effort"}
    assert {name.split("/")[0] for name in pages[1]} == cheap


def test_bad_arguments_and_strategies_are_refused():
    with pytest.raises(ValueError, match="every_n_steps=0"):
        AlignmentMonitor(0)
    with pytest.raises(ValueError, match="references"):
        AlignmentMonitor(references=["backpropagation"])
    with pytest.raises(ControlError, match="DFCStrategy"):
        quiet(callbacks=[AlignmentMonitor()]).fit(Innocent(), loader())


def test_what_is_frozen_does_not_count():
    module = Innocent()
    module.net[2].weight.requires_grad_(False)
    monitor, grads = AlignmentMonitor(1, ["backprop"]), Grads()
    pages, _ = watched(monitor, Backprop(), module=module, callbacks=[grads], max_epochs=1)
    assert monitor._sizes == [6 * 12 + 12, 8, 8 * 3 + 3]
    assert pages[1]["backprop/layer_2"] == 0


def test_a_training_that_blows_up_is_not_stopped():
    pages, _ = watched(AlignmentMonitor(1, tau_ratio=0.2), module=Innocent(lr=math.inf))
    assert len(pages) == 2 * BATCHES and math.isnan(pages[2 * BATCHES]["condition_3"])
