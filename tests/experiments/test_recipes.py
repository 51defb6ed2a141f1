import re
import sys

import pytest
import torch
from cases.paths import RECIPES

pytest.importorskip("jsonargparse")

from dfc_lightning import DFA, DFC, DFCStrategy, Expected, LayeredDFC, Sampled
from dfc_lightning.cli import RecipeCLI, main
from dfc_lightning.experiments.recipe import find_recipes
from dfc_lightning.experiments.table import COLUMNS, RULES
from dfc_lightning.models import Autoencoder, Classifier
from dfc_lightning.settling import Euler, Linearized, SteadyState, Trajectory

pytestmark = pytest.mark.filterwarnings(
    "ignore:(?s).*was deprecated in v4", "ignore:skip_none parameter", "ignore:(?s).*JsonargparseDeprecationWarning"
)
TABLE = [f"{column}/{rule}" for column in COLUMNS for rule in RULES]
ALL = [f"digits/{rule}" for rule in ("bp", "dfa", "dfc")] + TABLE
SHORT = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=20", "--trainer.num_sanity_val_steps=0"]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]

# The published settings: the effective learning rate, λ for the mean loss of a batch of 128, α.
SETTINGS = {
    "mnist/bp": (2.98e-4, None, None),
    "mnist/dfa": (2.63e-4, None, None),
    "mnist/dfc": (1.19e-3, 0.0779, 1.39e-3),
    "mnist/dfc_fixed": (6.0e-4, 0.1, 2.47e-4),
    "fashion_mnist/bp": (5.44e-4, None, None),
    "fashion_mnist/dfa": (7.68e-3, None, None),
    "fashion_mnist/dfc": (7.9e-4, 0.0561, 2.06e-4),
    "fashion_mnist/dfc_fixed": (5.4e-4, 0.1, 0.799),
    "mnist_autoencoder/bp": (1.37e-3, None, None),
    "mnist_autoencoder/dfa": (3.15e-4, None, None),
    "mnist_autoencoder/dfc": (9.2e-3, 0.0203, 0.0369),
    "mnist_autoencoder/dfc_fixed": (5.52e-5, 0.1, 1.88e-4),
    "mnist_train_loss/bp": (1.02e-4, None, None),
    "mnist_train_loss/dfa": (2.65e-2, None, None),
    "mnist_train_loss/dfc": (8.9e-3, 0.0111, 4.34e-5),
    "mnist_train_loss/dfc_fixed": (8.76e-4, 0.1, 3.34e-4),
}
# Initial passes; of feedback learning α, dt, states, k_p, σ, the two rates, L2; whether Q_L learns.
FEEDBACK = {
    "mnist": (10, 0.613, 2.03e-3, 48, 0.157, 1.52e-3, 3.17e-4, 5.27e-4, 1e-3, True),
    "fashion_mnist": (10, 0.234, 3.10e-3, 34, 6.43e-3, 2.45e-3, 4.54e-4, 2.37e-4, 0.1, False),
    "mnist_autoencoder": (15, 0.733, 3.26e-3, 60, 6.3e-3, 1.84e-3, 1.64e-4, 1.23e-5, 0.1, False),
    "mnist_train_loss": (20, 0.920, 1.27e-3, 44, 0.143, 0.0557, 6.71e-4, 4.45e-5, 1e-3, True),
}
# Simulated time in units of τ_u, and whether the apical compartments hear the control at once.
TIMES = {
    "mnist/dfc": (20.0, True),
    "mnist/dfc_fixed": (10.0, True),
    "fashion_mnist/dfc": (6.0, False),
    "fashion_mnist/dfc_fixed": (1.5, True),
    "mnist_autoencoder/dfc": (20.0, True),
    "mnist_autoencoder/dfc_fixed": (1.0, True),
    "mnist_train_loss/dfc": (0.5, False),
    "mnist_train_loss/dfc_fixed": (1.0, True),
}
# Table 1: mean and standard deviation.
PUBLISHED = {
    "bp": ((2.08, 0.15), (10.60, 0.34), (0.0942, 0.0009), (1.53e-7, 0.19e-7)),
    "dfc": ((2.25, 0.094), (11.17, 0.27), (0.1128, 0.0018), (7.61e-8, 0.65e-8)),
    "dfc_ssa": ((2.18, 0.16), (11.28, 0.27), (0.1127, 0.0009), (4.89e-8, 1.26e-8)),
    "dfc_ss": ((2.29, 0.097), (11.15, 0.32), (0.1121, 0.0004), (4.80e-8, 0.70e-8)),
    "dfc_fixed": ((2.47, 0.12), (11.62, 0.30), (0.3337, 0.0060), (1.30e-6, 0.15e-6)),
    "dfc_ssa_fixed": ((2.46, 0.11), (11.44, 0.14), (0.3190, 0.0077), (1.73e-6, 0.39e-6)),
    "dfc_ss_fixed": ((2.39, 0.22), (11.55, 0.42), (0.3231, 0.0037), (1.67e-6, 0.70e-6)),
    "dfa": ((2.69, 0.11), (11.38, 0.25), (0.2995, 0.0036), (7.09e-7, 1.11e-7)),
}


def some_slow(names):
    """The same, most of those beside digits marked as slow: a recipe takes the better part of a second to build."""
    quick = [*ALL[:3], "mnist", "mnist/bp", "mnist/dfc", "mnist/dfc_ss_fixed"]
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def near(value, digits=3):
    """The value as a table with so many digits has it."""
    return pytest.approx(value, rel=0.6 * 10 ** (1 - digits))


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dfc"])


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """What each recipe builds; nothing runs."""
    made = {}

    class Built(RecipeCLI):
        def _run_subcommand(self, subcommand):
            pass

    def build(name):
        if name not in made:
            made[name] = Built(["fit", f"--config={RECIPES / name}.yaml", *QUIET])
        return made[name]

    return build


def test_every_recipe_is_there():
    found = {f"{path.parent.name}/{path.stem}" for path in find_recipes(RECIPES)}
    assert set(ALL) <= found and len(TABLE) == 32


@pytest.mark.parametrize("name", some_slow(ALL))
def test_every_recipe_says_what_it_should_reach(built, name):
    opening = (RECIPES / f"{name}.yaml").read_text().split("\n\n")[0].replace("\n#", "")
    if name.startswith("digits"):
        assert re.search(r"Ours: test error \d", opening), opening
        return
    assert re.search(r"Meulemans et al\. \(2021\), Table 1: .* ± .* 5 seeds", opening), opening
    column, rule = name.split("/")
    expected = built(name).config_init.fit.expected
    metric = {"mnist_autoencoder": "test/loss", "mnist_train_loss": "train/loss"}.get(column, "test/error")
    assert (expected.metric, expected.seeds) == (metric, 5) and "Meulemans et al. 2021, Table 1" in expected.source
    assert (expected.mean, expected.std) == pytest.approx(PUBLISHED[rule][list(COLUMNS).index(column)])


@pytest.mark.parametrize("name", some_slow(ALL))
def test_every_recipe_builds_its_net_its_rule_and_its_data(built, name):
    cli, (task, rule) = built(name), name.split("/")
    autoencoder = task == "mnist_autoencoder"
    assert type(cli.model) is (Autoencoder if autoencoder else Classifier)
    linears = [layer for layer in cli.model.network if isinstance(layer, torch.nn.Linear)]
    sizes = [linears[0].in_features, *(layer.out_features for layer in linears)]
    digits, wide = [64, 64, 64, 10], [784, 256, 256, 256, 10]
    assert sizes == {"digits": digits, "mnist_autoencoder": [784, 256, 32, 256, 784]}.get(task, wide)
    kinds = [type(layer) for layer in cli.model.network if not isinstance(layer, (torch.nn.Linear, torch.nn.Flatten))]
    assert set(kinds) == ({torch.nn.Tanh, torch.nn.Identity} if autoencoder else {torch.nn.Tanh})

    assert cli.trainer.max_epochs == {"digits": 20, "mnist_autoencoder": 25}.get(task, 100)
    assert cli.trainer.precision == ("64-true" if task == "mnist_train_loss" else "32-true")
    assert cli.trainer.log_dir == f"runs/{name}/version_0"
    best = cli.trainer.checkpoint_callbacks[0]
    assert (best.monitor, best.mode) == ("val/loss" if autoencoder else "val/error", "min")

    strategy = cli.trainer.strategy
    if rule == "bp":
        assert not isinstance(strategy, DFCStrategy)
        return
    assert isinstance(strategy, DFCStrategy)
    assert type(strategy.rule) is (DFA if rule == "dfa" else LayeredDFC if task == "digits" else DFC)
    if rule == "dfa":
        assert strategy.learning is None
        assert (strategy.feedback_init or strategy.rule.feedback.init) == "xavier_normal"
    elif task != "digits":
        base = rule.removesuffix("_fixed")
        settling = {"dfc": Trajectory, "dfc_ssa": Linearized}.get(base, SteadyState)
        if name == "mnist_autoencoder/dfc_fixed":
            settling = Euler
        assert type(strategy.rule.settling) is settling and strategy.rule.integrate == (base == "dfc")
        assert strategy.rule.controller.leak == "control"
        fixed = rule.endswith("_fixed")
        assert strategy.feedback_init == ("weight_product" if fixed else "xavier_normal")
        assert strategy.learning.passes_per_epoch == (0 if fixed else 3)
        assert strategy.learning.initial_passes == (0 if fixed else FEEDBACK[task][0])


@pytest.mark.parametrize("name", some_slow(TABLE))
def test_learning_rate_target_and_leakage_are_the_published_ones_in_our_units(built, name):
    cli, (column, rule) = built(name), name.split("/")
    settings = rule if rule in ("bp", "dfa") else "dfc_fixed" if rule.endswith("_fixed") else "dfc"
    lr, target_stepsize, alpha = SETTINGS[f"{column}/{settings}"]
    (group,) = cli.model.configure_optimizers().param_groups
    digits = len(f"{lr:.2e}".split("e")[0].rstrip("0").replace(".", ""))
    assert group["lr"] == near(lr, digits) and group["betas"] == (0.99, 0.99)
    if target_stepsize is not None:
        made = cli.trainer.strategy.rule
        assert made.target_stepsize * 128 == near(target_stepsize)
        assert made.controller.alpha == near(alpha)
        assert made.controller.k_p == (0.0 if "ssa" in rule else 2.0)


@pytest.mark.slow
def test_epsilon_is_scaled_like_the_gradients(built):
    def eps(name):
        return built(name).model.configure_optimizers().param_groups[0]["eps"]

    assert eps("mnist/bp") == near(5.770e-8)
    assert eps("mnist/dfc") == near(9.446e-8 * 128 / (2 * 0.07794))
    assert eps("mnist/dfc") == pytest.approx(8e-5, rel=0.05)
    assert eps("mnist_autoencoder/dfc_ss") == near(2.779e-8 * 128 / (2 * 0.020277))
    assert eps("mnist_train_loss/dfa") == near(6.3137e-8 * 128 / (2 * 0.001))
    assert eps("fashion_mnist/dfc_ss_fixed") == near(1.4648e-10 * 128 / (2 * 0.1))


@pytest.mark.parametrize("column", some_slow(COLUMNS))
@pytest.mark.parametrize("rule", ["dfc", "dfc_ss", "dfc_ssa"])
def test_feedback_learning_is_the_published_one(built, column, rule):
    strategy = built(f"{column}/{rule}").trainer.strategy
    learning, method = strategy.learning, strategy.learning.method
    given = (learning.initial_passes, method.alpha, method.dt, method.steps + 1, method.k_p, method.sigma)
    given += (learning.initial_lr, learning.lr, learning.weight_decay)
    *figures, output_learns = FEEDBACK[column]
    assert given == tuple(near(figure, 2) for figure in figures)
    assert type(method) is Sampled and method.leak == "control" and learning.clip_norm == 1.0
    assert learning.train_output == output_learns
    assert method.sigma_output == (0.0 if column == "mnist_autoencoder" else None)


@pytest.mark.parametrize("name", some_slow(TIMES))
def test_simulated_time_is_the_published_one(built, name):
    settling, (time, proactive) = built(name).trainer.strategy.rule.settling, TIMES[name]
    assert settling.steps * settling.dt == pytest.approx(time, rel=0.005) and settling.tau_ratio == 0.2
    assert settling.proactive == proactive and settling.apical_tau is None


@pytest.mark.parametrize("name", some_slow([name for name in TABLE if "dfc" in name and "ssa" not in name]))
def test_samples_that_do_not_settle_teach_where_the_authors_let_them(built, name):
    column, rule = name.split("/")
    keep = column == "mnist_train_loss" or name in (
        "fashion_mnist/dfc_fixed",
        "fashion_mnist/dfc_ss_fixed",
        "mnist_autoencoder/dfc_fixed",
    )
    assert built(name).trainer.strategy.rule.unconverged == ("keep" if keep else "drop")


BEST = "mnist_autoencoder/dfc_best"


@pytest.mark.slow
def test_the_best_autoencoder_keeps_to_the_protocol_and_learns_its_feedback(built):
    cli, table = built(BEST), built("mnist_autoencoder/dfc_ss")
    assert cli.config_init.fit.expected is None
    assert repr(cli.model.network) == repr(table.model.network) and cli.trainer.max_epochs == table.trainer.max_epochs
    ours, theirs = (each.datamodule.hparams for each in (cli, table))
    assert ours == theirs and type(cli.datamodule) is type(table.datamodule)
    strategy = cli.trainer.strategy
    assert type(strategy.rule.settling) is SteadyState and strategy.rule.controller.steady_leakage == 10
    assert isinstance(strategy.learning.method, Expected) and strategy.learning.every_n_batches == 1


@pytest.mark.slow
def test_digits_learn_by_dfc_to_six_percent(capsys):
    main(["fit", f"--config={RECIPES / 'digits' / 'dfc.yaml'}", *QUIET])
    line = capsys.readouterr().out.splitlines()[-1]
    assert float(line.split()[1]) <= 6, line


@pytest.mark.real_data
def test_the_best_autoencoder_learns_on_its_data(real_data, capsys):
    real_data("MNIST")
    main(["fit", f"--config={RECIPES / BEST}.yaml", *QUIET, *SHORT])
    found = re.fullmatch(
        r"test/loss ([\d.]+) \(best validation epoch 0, val/loss [\d.]+\)", capsys.readouterr().out.splitlines()[-1]
    )
    assert found and float(found[1]) < 0.8  # 1 is the mean image's


@pytest.mark.real_data
@pytest.mark.parametrize("name", [name for name in ALL if not name.startswith("digits")])
def test_recipe_runs_on_its_data(real_data, capsys, name):
    real_data("FashionMNIST" if name.startswith("fashion") else "MNIST")
    options = [*SHORT]
    if "dfc" in name and not name.endswith("_fixed"):
        options += [
            f"--trainer.strategy.init_args.feedback.{passes}=0" for passes in ("initial_passes", "passes_per_epoch")
        ]
    if name == "mnist_autoencoder/dfc_fixed":
        options.append("--trainer.strategy.init_args.rule.init_args.settling.init_args.steps=10")
    main(["fit", f"--config={RECIPES / name}.yaml", *QUIET, *options])
    line = capsys.readouterr().out.splitlines()[-1]
    when = r"epoch 0" if name.startswith("mnist_train_loss") else r"best validation epoch 0, val/\w+ [\d.]+"
    assert re.fullmatch(
        rf"(test|train)/(error|loss) [\d.]+ \({when}\); published \S+ ± \S+, 5 seeds, .* 2021, Table 1", line
    )
