import os
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("jsonargparse")

from dfc_lightning import DFA, DFC, DFCStrategy, Sampled
from dfc_lightning.cli import RecipeCLI, main
from dfc_lightning.models import Autoencoder, Classifier
from dfc_lightning.settling import Linearized, SteadyState, Trajectory

pytestmark = pytest.mark.filterwarnings(
    "ignore:(?s).*was deprecated in v4", "ignore:skip_none parameter", "ignore:(?s).*JsonargparseDeprecationWarning"
)
RECIPES = Path(__file__).parent.parent / "recipes"
ALL = sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.glob("*/*.yaml"))
RULES = ("bp", "dfa", "dfc", "dfc_ss", "dfc_ssa", "dfc_fixed")
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]

# The columns of the published settings: the effective learning rate, λ for the mean loss of a batch of 128.
PUBLISHED = {
    "mnist/bp": (2.98e-4, None),
    "mnist/dfa": (2.63e-4, None),
    "mnist/dfc": (1.19e-3, 0.0779),
    "mnist/dfc_ss": (1.19e-3, 0.0779),
    "mnist/dfc_ssa": (1.19e-3, 0.0779),
    "mnist/dfc_fixed": (6.0e-4, 0.1),
    "fashion_mnist/dfc": (7.9e-4, 0.0561),
    "fashion_mnist/dfc_ss": (7.9e-4, 0.0561),
    "fashion_mnist/dfc_ssa": (7.9e-4, 0.0561),
    "mnist_autoencoder/dfc_ss": (9.2e-3, 0.0203),
}
# α and k_p of the controller; initial passes; of feedback learning α, dt, states, k_p, σ, the two rates, L2.
MNIST = (1.39e-3, 2.0, 10, 0.613, 2.03e-3, 48, 0.157, 1.52e-3, 3.17e-4, 5.27e-4, 1e-3)
AUTOENCODER = (0.0369, 2.0, 15, 0.733, 3.26e-3, 60, 6.3e-3, 1.84e-3, 1.64e-4, 1.23e-5, 0.1)


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
    tasks = {"digits": ("bp", "dfc", "dfa"), "mnist_autoencoder": ("bp", "dfc_ss", "dfa")}
    tasks |= {"mnist": RULES, "fashion_mnist": RULES}
    assert {f"{task}/{rule}" for task, rules in tasks.items() for rule in rules} <= set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_every_recipe_says_what_it_should_reach(name):
    opening = (RECIPES / f"{name}.yaml").read_text().split("\n\n")[0].replace("\n#", "")
    reaches = (
        r"Ours: test error \d"
        if name.startswith("digits")
        else r"Meulemans et al\. \(2021\), Table 1: test .* ± .* 5 seeds"
    )
    assert opening.startswith("#") and re.search(reaches, opening), opening


@pytest.mark.parametrize("name", ALL)
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
    assert cli.trainer.log_dir == f"runs/{name}/version_0"
    best = cli.trainer.checkpoint_callbacks[0]
    assert (best.monitor, best.mode) == ("val/loss" if autoencoder else "val/error", "min")

    strategy = cli.trainer.strategy
    if rule == "bp":
        assert not isinstance(strategy, DFCStrategy)
        return
    assert isinstance(strategy, DFCStrategy)
    assert type(strategy.rule) is (DFA if rule == "dfa" else DFC)
    if rule == "dfa":
        assert strategy.learning is None and strategy.feedback_init == "xavier_normal"
    elif task != "digits":
        settling = {"dfc": Trajectory, "dfc_ssa": Linearized}.get(rule, SteadyState)
        assert type(strategy.rule.settling) is settling and strategy.rule.integrate == (rule == "dfc")
        assert strategy.rule.controller.leak == "control"
        fixed = rule == "dfc_fixed"
        assert strategy.feedback_init == ("weight_product" if fixed else "xavier_normal")
        assert strategy.learning.passes_per_epoch == (0 if fixed else 3)


@pytest.mark.parametrize("name", PUBLISHED)
def test_learning_rate_and_target_are_the_published_ones_in_our_units(built, name):
    cli, (lr, target_stepsize) = built(name), PUBLISHED[name]
    (group,) = cli.model.configure_optimizers().param_groups
    digits = len(f"{lr:.2e}".split("e")[0].rstrip("0").replace(".", ""))
    assert group["lr"] == near(lr, digits) and group["betas"] == (0.99, 0.99)
    if target_stepsize is not None:
        assert cli.trainer.strategy.rule.target_stepsize * 128 == near(target_stepsize)


def test_epsilon_is_scaled_like_the_gradients(built):
    def eps(name):
        return built(name).model.configure_optimizers().param_groups[0]["eps"]

    assert eps("mnist/bp") == near(5.770e-8)
    assert eps("mnist/dfc") == near(9.446e-8 * 128 / (2 * 0.07794))
    assert eps("mnist/dfc") == pytest.approx(8e-5, rel=0.05)
    assert eps("mnist_autoencoder/dfc_ss") == near(2.779e-8 * 128 / (2 * 0.020277))


@pytest.mark.parametrize(
    ("name", "figures"),
    [("mnist/dfc", MNIST), ("mnist/dfc_ss", MNIST), ("mnist_autoencoder/dfc_ss", AUTOENCODER)],
)
def test_controller_and_feedback_learning_are_the_published_ones(built, name, figures):
    strategy = built(name).trainer.strategy
    controller, learning, method = strategy.rule.controller, strategy.learning, strategy.learning.method
    given = (controller.alpha, controller.k_p, learning.initial_passes)
    given += (method.alpha, method.dt, method.steps + 1, method.k_p, method.sigma)
    given += (learning.initial_lr, learning.lr, learning.weight_decay)
    assert given == tuple(near(figure, 2) for figure in figures)
    assert type(method) is Sampled and method.leak == "control" and learning.clip_norm == 1.0
    output_learns = name.startswith("mnist/")
    assert learning.train_output == output_learns and method.sigma_output == (None if output_learns else 0.0)


@pytest.mark.parametrize(("name", "steps"), [("mnist/dfc", 1000), ("fashion_mnist/dfc", 300)])
def test_simulated_time_is_the_published_one(built, name, steps):
    settling = built(name).trainer.strategy.rule.settling
    assert (settling.steps + 1, settling.dt, settling.tau_ratio) == (steps, 0.02, 0.2)
    assert settling.apical_tau is None


@pytest.mark.slow
def test_digits_learn_by_dfc_to_six_percent(capsys):
    main(["fit", f"--config={RECIPES / 'digits' / 'dfc.yaml'}", *QUIET])
    line = capsys.readouterr().out.splitlines()[-1]
    assert float(line.split()[1]) <= 6, line


@pytest.mark.real_data
@pytest.mark.parametrize("name", [name for name in ALL if not name.startswith("digits")])
def test_recipe_runs_on_its_data(capsys, name):
    root, data = os.environ.get("DFC_DATA_ROOT"), "FashionMNIST" if name.startswith("fashion") else "MNIST"
    if root is None or not (Path(root) / data / "raw").is_dir():
        pytest.skip(f"DFC_DATA_ROOT holds no {data}/raw")
    options = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=20", "--trainer.num_sanity_val_steps=0"]
    if "dfc" in name:
        options += [
            f"--trainer.strategy.init_args.feedback.{passes}=0" for passes in ("initial_passes", "passes_per_epoch")
        ]
    if name.endswith("/dfc"):
        options.append("--trainer.strategy.init_args.rule.init_args.settling.init_args.steps=50")
    main(["fit", f"--config={RECIPES / name}.yaml", *QUIET, *options])
    assert re.match(r"test/(error|loss) [\d.]+ \(best validation epoch 0", capsys.readouterr().out.splitlines()[-1])
