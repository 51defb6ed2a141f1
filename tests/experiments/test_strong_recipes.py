"""The recipes of Strong-DFC are the published command lines, of the authors' EXPERIMENTS.rst, in our units."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
from cases.paths import RECIPES

pytest.importorskip("jsonargparse")

from dfc_lightning import StrongDFC, StrongSampled, TwoPhaseStrongDFC
from dfc_lightning.callbacks import LayerClipping
from dfc_lightning.cli import RecipeCLI, main
from dfc_lightning.settling import StrongSimulation

pytestmark = pytest.mark.filterwarnings(
    "ignore:(?s).*was deprecated in v4", "ignore:skip_none parameter", "ignore:(?s).*JsonargparseDeprecationWarning"
)
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]

# Accuracy; --lr, --adam_epsilon, --adam_beta1, --adam_beta2, --target_class_value, --time_constant_ratio, --alpha_di;
# --lr_fb, --adam_epsilon_fb, --weight_decay_fb, --adam_beta1_fb, --adam_beta2_fb, --init_fb_epochs, --lr_fb_init;
# --dt_di_fb, --time_constant_ratio_fb, --alpha_di_fb, --k_p_fb. A beta that is not given is 0.99.
FORWARD = ("lr", "eps", "beta1", "beta2", "target", "tau", "alpha")
FEEDBACK = ("lr_fb", "eps_fb", "decay_fb", "beta1_fb", "beta2_fb", "initial", "lr_initial")
PHASE = ("dt_fb", "tau_fb", "alpha_fb", "k_p_fb")
PUBLISHED: dict[str, tuple[float, tuple[float, ...]]] = {
    "mnist/strong_dfc_single_phase": (
        97.72,
        (0.0003095880739373081, 1.6288767089312233e-05, 0.9, 0.99, 0.99, 0.009268288409004458, 7.608673370995652e-06)
        + (2.0091405897656825e-08, 1.1023320392297719e-11, 0.5, 0.99, 0.999, 1, 4.5160347135162454e-07)
        + (0.0012167769308505587, 0.014441072404716454, 0.016257243484558315, 0.0028004742554235116),
    ),
    "mnist/strong_dfc_two_phase": (
        97.75,
        (0.0006560184719951886, 0.00023225688276019436, 0.9, 0.99, 0.9, 0.03553062335953924, 0.008082122141749502)
        + (9.776610079269425e-06, 0.0019707791920650247, 1e-05, 0.999, 0.9, 1, 0.0002730319014715041)
        + (0.0031943783402810927, 0.0072383695016716215, 0.9944618528446518, 0.0691564739128701),
    ),
    "fashion_mnist/strong_dfc_single_phase": (
        87.26,
        (0.0009531990715839369, 9.710433697812103e-08, 0.99, 0.999, 0.99, 0.012867645074062533, 7.6370562381715e-05)
        + (2.286529865070366e-08, 1.8382415746971348e-11, 0, 0.99, 0.999, 20, 3.431924248095537e-07)
        + (0.0006919071551575181, 0.0006919071551575181, 0.6266762258519998, 0.02488635344325425),
    ),
    "fashion_mnist/strong_dfc_two_phase": (
        87.22,
        (0.0011969828175078612, 2.9646405819945323e-07, 0.9, 0.9, 0.999, 0.007427384207234133, 0.0013123372965380246)
        + (1.587623302238223e-05, 8.46521372179368e-08, 0.1, 0.99, 0.999, 1, 0.00042756758315276166)
        + (0.0019841648377832226, 0.009034403214049455, 0.41918471180494776, 0.09906907227394046),
    ),
}
# --sigma, --sigma_output, --sigma_fb, --sigma_output_fb, --tau_noise
NOISE = {
    "mnist": (0.004278964325349612, 0.029713880264874388, 2.760795719756352e-05, 1.5149030252289032e-05, 0.07),
    "fashion_mnist": (0.0033626248925544607, 0.040920898808660004, 3.885866343508479e-06, 1.9337256383926155e-05, 0.05),
}
APICAL = {"mnist": 0.12961120842685991, "fashion_mnist": 0.22603240790914256}
some_slow = pytest.mark.parametrize(
    "name", [name if name == "mnist/strong_dfc_two_phase" else pytest.param(name, marks=pytest.mark.slow)
             for name in PUBLISHED]
)  # fmt: skip


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dfc"])


class Built(RecipeCLI):
    """Builds, and runs nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


@some_slow
def test_recipes_are_the_published_command_lines(name: str) -> None:
    cli = Built(["fit", f"--config={RECIPES / name}.yaml", *QUIET])
    accuracy, values = PUBLISHED[name]
    theirs = dict(zip(FORWARD + FEEDBACK + PHASE, values, strict=True))
    column, single = name.split("/")[0], name.endswith("single_phase")
    strategy = cli.trainer.strategy
    rule, learning = strategy.rule, strategy.learning
    method, passes = learning.method, learning.method.settling

    (group,) = cli.model.configure_optimizers().param_groups
    optimizer = (group["lr"], 2 * group["eps"], *group["betas"])  # their gradients are twice ours
    smoothing = cli.model.label_smoothing
    found = (*optimizer, 1 - 0.9 * smoothing, rule.settling.tau_ratio, rule.controller.alpha)
    found += (learning.lr, learning.eps, learning.weight_decay, *learning.betas)
    found += (learning.initial_passes, learning.initial_lr)
    found += (passes.dt, passes.tau_ratio, method.controller.alpha, method.controller.k_p)
    assert found == pytest.approx(tuple(theirs.values()), rel=1e-4)

    assert type(rule) is (StrongDFC if single else TwoPhaseStrongDFC) and type(method) is StrongSampled
    assert type(rule.settling) is StrongSimulation
    assert (rule.settling.steps, rule.settling.dt, passes.steps) == (499, 1e-3, 499)
    assert rule.settling.proactive and passes.proactive and rule.link is method.link is None
    assert rule.controller.k_p == 2 and {rule.controller.leak, method.controller.leak} == {"control"}
    assert learning.clip_norm == 1 and learning.clip_each and learning.train_output
    assert learning.passes_per_epoch == (0 if single else {"mnist": 1, "fashion_mnist": 3}[column])
    (clipping,) = [c for c in cli.trainer.callbacks if isinstance(c, LayerClipping)]
    assert clipping.max_norm == 0.5
    if single:
        sigmas = (rule.settling.sigma, rule.settling.sigma_output, passes.sigma, passes.sigma_output)
        assert (*sigmas, rule.settling.tau_noise) == pytest.approx(NOISE[column], rel=1e-4)
        assert passes.tau_noise == rule.settling.tau_noise and rule.layer_gain is None and rule.tau_f == 0.5
        # The authors' code filters by the share of the forward step, and has the forward gain, before training too.
        assert passes.dt / method.tau_f == pytest.approx(1e-3 / 0.5, rel=1e-4)
        gain = 1 + theirs["tau"] / NOISE[column][-1]
        assert method.layer_gain == pytest.approx(gain, rel=1e-4)
    else:
        assert (passes.sigma, passes.sigma_output, passes.tau_noise, method.tau_f) == (0.15, None, None, None)
        assert passes.apical_tau == pytest.approx(APICAL[column], rel=1e-4)

    assert (cli.trainer.max_epochs, cli.trainer.precision) == (40, "64-true")
    assert cli.trainer.log_dir == f"runs/{name}/version_0"
    assert strategy.feedback_init == "xavier_normal" and cli.datamodule.batch_size == 128
    assert cli.datamodule.standardize == (column == "mnist")  # theirs scales Fashion-MNIST to [0, 1] alone
    expected = cli.config_init.fit.expected
    assert (expected.metric, expected.mean) == ("test/error", pytest.approx(100 - accuracy))


@pytest.mark.real_data
@pytest.mark.parametrize("name", PUBLISHED)
def test_they_learn_on_their_data(real_data: Any, capsys: pytest.CaptureFixture[str], name: str) -> None:
    real_data("FashionMNIST" if name.startswith("fashion") else "MNIST")
    settings = "--trainer.strategy.init_args."
    rule = "rule.init_args.settling." + ("" if name.endswith("single_phase") else "init_args.")
    short = [f"{settings}{rule}steps=30", f"{settings}{rule}dt=0.005", f"{settings}{rule}tau_ratio=0.01"]
    short += [f"{settings}feedback.initial_passes=0", f"{settings}feedback.passes_per_epoch=0"]
    short += ["--trainer.max_epochs=1", "--trainer.limit_train_batches=60", "--trainer.num_sanity_val_steps=0"]
    main(["fit", f"--config={RECIPES / name}.yaml", *QUIET, *short])
    line = capsys.readouterr().out.splitlines()[-1]
    found = re.match(r"test/error ([\d.]+) \(best validation epoch 0.*EXPERIMENTS.rst", line)
    assert found and float(found[1]) < 50, line
