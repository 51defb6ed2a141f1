"""The recipes of Figure 3 are the paper's, and a short run of them bears out what the paper says of it."""

from __future__ import annotations

import sys

import pytest
import torch
from cases.paths import RECIPES

pytest.importorskip("jsonargparse")

from dfc_lightning import DFA, DFC
from dfc_lightning.callbacks import AlignmentMonitor
from dfc_lightning.cli import RecipeCLI, main
from dfc_lightning.data import StudentTeacher
from dfc_lightning.models import Regressor
from dfc_lightning.plots import read_run
from dfc_lightning.settling import Linearized, SteadyState, Trajectory

pytestmark = pytest.mark.filterwarnings(
    "ignore:(?s).*was deprecated in v4", "ignore:skip_none parameter", "ignore:(?s).*JsonargparseDeprecationWarning"
)
TOY = RECIPES / "toy"
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
SETTLING = {"dfc": Trajectory, "dfc_ss": SteadyState, "dfc_ssa": Linearized}
NAMES = [*SETTLING, *(f"{rule}_fixed" for rule in SETTLING), "dfa"]
CONTROLLED = ("dfc", "dfc_ss", "dfc_ss_fixed")
EPOCHS, LATE = 25, 5


class Built(RecipeCLI):
    """Builds what a recipe says, and runs nothing."""

    def _run_subcommand(self, subcommand):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_has_the_published_settings_in_our_units(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dfc"])
    cli = Built(["fit", f"--config={TOY / name}.yaml", *QUIET])
    trainer, strategy = cli.trainer, cli.trainer.strategy
    assert type(cli.model) is Regressor and type(cli.datamodule) is StudentTeacher
    linears = [layer for layer in cli.model.network if isinstance(layer, torch.nn.Linear)]
    assert [layer.out_features for layer in linears] == [10, 10, 5] and linears[0].in_features == 15
    optimizer = cli.model.configure_optimizers()
    assert type(optimizer) is torch.optim.SGD and optimizer.param_groups[0]["lr"] == pytest.approx(2 * 0.05 / 128)
    assert (trainer.max_epochs, trainer.log_dir) == (300, f"runs/toy/{name}/version_0")
    (monitor,) = [callback for callback in trainer.callbacks if isinstance(callback, AlignmentMonitor)]
    assert monitor.every_n_steps == 40 and monitor.damping == (0.0 if name == "dfa" else 0.1)
    rule = strategy.rule
    if name == "dfa":
        assert type(rule) is DFA and strategy.feedback_init == "xavier_normal"
        return
    assert type(rule) is DFC and type(rule.settling) is SETTLING[name.removesuffix("_fixed")]
    assert rule.target_stepsize * 128 == pytest.approx(0.05) and rule.integrate == (type(rule.settling) is Trajectory)
    assert (rule.controller.alpha, rule.controller.k_p, rule.controller.leak) == (0.0015, 1.5, "control")
    learning = strategy.learning
    fixed = name.endswith("_fixed")
    assert strategy.feedback_init == ("weight_product" if fixed else "xavier_normal")
    assert (learning.initial_passes, learning.passes_per_epoch) == ((0, 0) if fixed else (50, 3))
    if not fixed:
        method = learning.method
        assert (learning.initial_lr, learning.lr, learning.weight_decay) == (0.1, 0.002, 0.025)
        assert (method.steps + 1, method.dt, method.tau_ratio, method.apical_tau) == (50, 0.002, 0.01, 0.3)
        assert (method.alpha, method.k_p, method.sigma) == (0.25, 0.1, 0.01)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Short runs of the recipes, with fewer feedback passes at a larger rate where feedback learns."""
    folder = tmp_path_factory.mktemp("figure_3")
    feedback = "--trainer.strategy.init_args.feedback"
    fewer = [f"{feedback}.initial_passes=3", f"{feedback}.passes_per_epoch=1", f"{feedback}.lr=0.005"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["dfc"])
        for name in (*CONTROLLED, "dfa"):
            options = [*QUIET, f"--trainer.max_epochs={EPOCHS}", *(fewer if name in ("dfc", "dfc_ss") else [])]
            main(["fit", f"--config={TOY / name}.yaml", *options])
    return {path.name: read_run(path) for path in (folder / "runs" / "toy").iterdir()}


def values(run, name):
    found = run.series[f"alignment/{name}"].values
    assert len(found) == EPOCHS
    return torch.tensor(found)


def early_and_late(run, name):
    found = values(run, name)
    return float(found[:LATE].mean()), float(found[-LATE:].mean())


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["dfc", "dfc_ss"])
def test_learned_feedback_keeps_condition_two_and_fixed_feedback_loses_it(runs, rule):
    learned, fixed = (early_and_late(runs[name], "condition_2") for name in (rule, "dfc_ss_fixed"))
    assert min(learned) > 0.95 and values(runs[rule], "condition_2").min() > 0.9
    assert fixed[0] - fixed[1] > 2 * (learned[0] - learned[1]) and fixed[1] < 0.94


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["dfc", "dfc_ss"])
@pytest.mark.parametrize("reference", ["minimum_norm", "gauss_newton"])
def test_updates_stay_near_minimum_norm_and_gauss_newton_with_learned_feedback_only(runs, rule, reference):
    learned, fixed = (early_and_late(runs[name], f"{reference}/total") for name in (rule, "dfc_ss_fixed"))
    assert learned[1] < {"minimum_norm": 13, "gauss_newton": 18}[reference]
    assert fixed[1] > 1.4 * learned[1] and fixed[1] > 1.5 * fixed[0]
    assert early_and_late(runs["dfa"], f"{reference}/total")[1] > fixed[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTROLLED)
def test_the_network_under_control_is_stable_throughout(runs, name):
    assert values(runs[name], "condition_3").max() < 0 and values(runs[name], "stability").max() < -0.4


@pytest.mark.slow
def test_dfc_and_dfc_ss_are_near_dfc_ssa(runs):
    assert values(runs["dfc_ss"], "ssa/total").max() < 0.1
    angles = values(runs["dfc"], "ssa/total")
    assert angles.max() < 5 and angles.min() > 0.2  # it averages over the transient, which DFC-SSA leaves out


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CONTROLLED, "dfa"])
def test_every_rule_learns_the_task(runs, name):
    losses = runs[name].series["val/loss"].values
    assert losses[-1] < 0.7 * losses[0]
