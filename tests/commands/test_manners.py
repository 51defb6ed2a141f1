"""What the command says to somebody who does not know it: what there is, what was meant, what is missing."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from cases.paths import RECIPES, ROOT

pytest.importorskip("jsonargparse")

import dfc_lightning
from dfc_lightning import cli
from dfc_lightning.commands import COMMANDS, FITTING
from dfc_lightning.experiments import shipped
from dfc_lightning.experiments.recipe import find_recipes

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
SHORT = [*QUIET, "--trainer.max_epochs=1", "--trainer.limit_train_batches=4", "--trainer.num_sanity_val_steps=0"]
RULE, NETWORK = "--trainer.strategy.init_args.rule", "--model.init_args.network"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dfc"])
    monkeypatch.setattr(sys, "path", list(sys.path))


def ended(capsys, *words):
    """The code, and what stands on stderr."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(words))
    code = stopped.value.code
    return (1, code) if isinstance(code, str) else (code, capsys.readouterr().err)


@pytest.mark.parametrize("words", [[], ["--help"], ["help"]])
def test_alone_it_lists_its_commands(capsys, words):
    cli.main(words)
    said = capsys.readouterr().out
    assert all(
        re.search(rf"^  {name} +{re.escape(purpose)}$", said, re.M) for name, purpose in (FITTING | COMMANDS).items()
    )


def test_its_version_is_the_packages(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out.startswith(f"dfc_lightning {dfc_lightning.__version__} (torch {torch.__version__}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fitt"], "no command 'fitt'. Did you mean dfc fit\\?"),
        (["predict"], "no command 'predict'."),
        (["foo"], "no command 'foo'."),
        (["fit"], "dfc fit needs a recipe: dfc fit --recipe digits/dfc"),
        (["test", "--trainer.max_epochs=1"], "dfc test needs a recipe"),
        (["fit", "--recipe=digits/dfc", "--trainer.max_epoch=1"], r"Did you mean --trainer\.max_epochs\?"),
        (["fit", "--recipe=digits/dfc", "--threads=0"], "--threads=0 must be one or more"),
    ],
)  # fmt: skip
def test_what_was_meant_is_asked(capsys, words, said):
    code, found = ended(capsys, *words)
    assert code == 2 and re.search(said, found), found


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--model.init_args.optimizer.init_args.lr=fast", "--model.optimizer.lr: 'fast' is not of the type float"),
        (f"{RULE}=dfa", r"--trainer.strategy.rule: there is no class 'dfa'; ours are .*DFA, DFC, .*Did you mean DFA\?"),
        (f"{NETWORK}=MPL", r"--model.network: there is no class 'MPL'; ours are GPT, LeNet, MLP, .*Did you mean MLP\?"),
        (
            "--trainer.strategy.init_args.feedback.method=Expcted",
            r"--trainer.strategy.feedback.method: .*Did you mean Expected\?",
        ),
        ("--data=digits", r"--data: there is no class 'digits'; .*Did you mean Digits\?"),
    ],
)
def test_a_refusal_is_one_line_that_names_what_there_is(capsys, option, said):
    code, found = ended(capsys, "fit", "--recipe=digits/dfc", option)
    error, tip = found.splitlines()
    assert code == 2 and re.match(f"error: {said}", error), found
    assert tip == "tip: dfc fit --help lists the options."


def printed(capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["fit", *words, "--print_config"])
    assert stopped.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("words", [[f"{NETWORK}=MLP"], [NETWORK, "MLP"], ["--config=mine.yaml"]])
def test_our_classes_go_by_their_names_where_torchvision_has_the_same(capsys, words):
    pytest.importorskip("torchvision.ops")
    Path("mine.yaml").write_text("model: {init_args: {network: {class_path: MLP, init_args: {sizes: [64, 10]}}}}")
    found = printed(capsys, "--recipe=digits/dfc", *words, f"{NETWORK}.init_args.sizes=[64, 10]")
    assert found["model"]["init_args"]["network"]["class_path"] == "dfc_lightning.models.MLP"


def test_a_module_in_the_working_directory_is_found():
    Path("mymod.py").write_text(
        "from dfc_lightning.models import MLP, Classifier\n"
        "class Mine(Classifier):\n    def __init__(self):\n        super().__init__(MLP([64, 16, 10]))\n"
    )
    cli.main(["fit", "--model=mymod.Mine", "--data=Digits", "--trainer.logger=false", *SHORT])
    del sys.modules["mymod"]


def test_a_test_without_a_checkpoint_says_that_the_net_is_untrained():
    with pytest.warns(UserWarning, match="no --ckpt_path: what is tested are the weights that training would begin"):
        cli.main(["test", "--recipe=digits/bp", "--trainer.logger=false", *QUIET])


def test_libraries_do_not_complain_of_each_other(capsys, recwarn):
    cli.main(["fit", "--recipe=digits/bp", *SHORT])
    said = capsys.readouterr()
    noise = [str(w.message) for w in recwarn] + said.err.splitlines()
    assert not [line for line in noise if "deprecat" in line or "workers" in line or "Tip" in line]


# Recipes by name


def test_every_recipe_is_known_by_its_name_from_anywhere(capsys):
    known = shipped.known_recipes()
    assert set(known.values()) == set(find_recipes(RECIPES)) and "mnist/dfc_ss" in known
    assert printed(capsys, "--recipe=mnist/dfc_ss") == printed(capsys, f"--config={RECIPES}/mnist/dfc_ss.yaml")
    assert printed(capsys, "--recipe", "digits/bp", "--recipe=trackers/wandb")["trainer"]["callbacks"]


def test_recipes_of_the_working_directory_go_before_the_packages(capsys):
    Path("recipes/digits").mkdir(parents=True)
    Path("recipes/digits/bp.yaml").write_text(f"base: {RECIPES}/digits/bp.yaml\ntrainer: {{max_epochs: 7}}\n")
    assert printed(capsys, "--recipe=digits/bp")["trainer"]["max_epochs"] == 7
    assert printed(capsys, "--recipe=digits/dfa")["trainer"]["max_epochs"] == 20


def test_a_recipe_that_is_not_there_is_asked_for(capsys):
    code, said = ended(capsys, "fit", "--recipe=mnist/dfcss")
    assert code == 1 and said.startswith("error: --recipe=mnist/dfcss: there is no recipe of this name. Did you mean")


def test_list_has_every_recipe_with_published_figure_price_and_data(capsys):
    cli.main(["list"])
    said = capsys.readouterr().out
    names = {path for path in shipped.known_recipes() if not path.startswith("trackers")}
    assert {line.split()[0] for line in said.splitlines()[1:-2]} == names
    (line,) = [line for line in said.splitlines() if line.startswith("mnist/dfc_ss ")]
    assert re.search(r"test/error 2.29 ± 0.097 +test/error [\d.]+ +\d+ min +MNIST", line)
    cli.main(["list", "digits/dfc"])
    assert "Scikit-learn's digits by Deep Feedback Control" in capsys.readouterr().out
    code, said = ended(capsys, "list", "nothing")
    assert code == 2 and "NAME=nothing: no recipe's name begins so" in said


def test_what_is_compared_is_noted_apart_from_the_tracked_results(capsys):
    cli.main(["compare", "digits/bp", "--epochs=1"])
    assert Path("runs/results/table.jsonl").is_file() and not Path("results").exists()


def test_the_wheel_has_recipes_and_results_where_they_are_looked_for():
    tomllib = pytest.importorskip("tomllib")
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    package = Path(shipped.__file__).parent.parent
    for source, target in wheel["force-include"].items():
        assert (ROOT / source).exists()
        assert (package.parent / target).relative_to(package).parts[0] in ("recipes", "results")


# Completion


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("dfc co", {"compare", "completion"}),
        ("dfc fit --recipe digits/d", {"digits/dfa", "digits/dfc"}),
        ("dfc fit --rec", {"--recipe"}),
        ("dfc doctor --rec", set()),
    ],
)
def test_bash_completes_commands_recipes_and_options(capsys, line, completed):
    cli.main(["completion", "bash"])
    words = " ".join(f"'{word}'" for word in line.split())
    asked = f"COMP_WORDS=({words}); COMP_CWORD={len(line.split()) - 1}; _dfc; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    said = subprocess.run(["bash", "-c", capsys.readouterr().out + asked], capture_output=True, text=True, check=True)
    assert set(said.stdout.split()) == completed and not said.stderr


# What is found here


def test_the_doctor_names_what_is_there(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("DFC_DATA_ROOT", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cli.main(["doctor"])
    said = capsys.readouterr().out
    assert re.search(rf"^torch +{re.escape(metadata.version('torch'))}$", said, re.M)
    assert re.search(r"^threads +\d+ of \d+ cores; OMP_NUM_THREADS=1$", said, re.M)
    assert re.search(r"^  MNIST +not found$", said, re.M)
    assert "export DFC_DATA_ROOT=FOLDER  # that holds MNIST, FashionMNIST, CIFAR10" in said


def test_the_doctor_names_the_command_that_mends_what_is_missing(capsys, monkeypatch):
    version = metadata.version
    monkeypatch.setattr(metadata, "requires", lambda name: ["torch>=2.7", "nosuch[a]>=1", "torchmetrics>=99"])
    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor"])
    said = capsys.readouterr().out
    assert stopped.value.code == 1 and re.search(r"^nosuch +not installed: needs >=1$", said, re.M)
    assert 'pip install "nosuch[a]>=1"' in said and 'pip install "torchmetrics>=99"' in said
