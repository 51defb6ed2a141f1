import csv
import os
import re
import subprocess
import sys
from dataclasses import replace
from typing import ClassVar

import pytest
import yaml
from cases.paths import RECIPES

pytest.importorskip("jsonargparse")

from lightning.pytorch.loggers import Logger

from dfc_lightning import DFC, DFCStrategy, cli
from dfc_lightning.experiments import composition

pytestmark = pytest.mark.filterwarnings(
    "ignore:(?s).*was deprecated in v4", "ignore:skip_none parameter", "ignore:(?s).*JsonargparseDeprecationWarning"
)
DIGITS = RECIPES / "digits" / "dfc.yaml"
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
SHORT = [*QUIET, "--trainer.max_epochs=1", "--trainer.limit_train_batches=4", "--trainer.num_sanity_val_steps=0"]
RULE = "--trainer.strategy.init_args.rule"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dfc"])


def fit(*options, recipe=DIGITS):
    cli.main(["fit", f"--config={recipe}", *options])


def refusal(capsys, *options):
    """The exit code of a fit that is refused, and what it says."""
    with pytest.raises(SystemExit) as stopped:
        fit(*options)
    said = stopped.value.code if isinstance(stopped.value.code, str) else capsys.readouterr().err
    return (1 if isinstance(stopped.value.code, str) else stopped.value.code), said


def config(capsys, *options, recipe=DIGITS):
    with pytest.raises(SystemExit) as stopped:
        fit(*options, "--print_config", recipe=recipe)
    assert stopped.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_fit_ends_with_the_test_of_the_best_validation_epoch(tmp_path, capsys):
    fit(*QUIET, "--trainer.max_epochs=3", "--trainer.limit_train_batches=8")
    line = capsys.readouterr().out.splitlines()[-1]
    told = re.fullmatch(r"test/error (\S+) \(best validation epoch (\d+), val/error (\S+)\)", line)
    assert told, line
    run = tmp_path / "runs" / "digits" / "dfc" / "version_0"
    rows = list(csv.DictReader(open(run / "metrics.csv")))
    errors = {int(row["epoch"]): float(row["val/error"]) for row in rows if row["val/error"]}
    (test,) = [float(row["test/error"]) for row in rows if row["test/error"]]
    best = min(errors, key=lambda epoch: (errors[epoch], epoch))
    assert (int(told[2]), float(told[3])) == (best, pytest.approx(errors[best], rel=1e-3))
    assert float(told[1]) == pytest.approx(test, rel=1e-3)
    assert (run / "config.yaml").exists()
    assert [path.name for path in (run / "checkpoints").glob("epoch=*")] == [f"epoch={best}-step={8 * best + 8}.ckpt"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--trainer.fast_dev_run=1"], [*SHORT, "--trainer.callbacks=null"]])
def test_without_a_best_checkpoint_the_final_weights_are_tested(tmp_path, capsys, options):
    fit(*QUIET, *options)
    assert re.search(r"test/error \S+ \(final weights\)", capsys.readouterr().out.splitlines()[-1])


def test_fast_dev_run_leaves_nothing_behind(tmp_path):
    fit(*QUIET, "--trainer.fast_dev_run=1")
    assert not list(tmp_path.rglob("*.ckpt")) and not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_run_goes_on_from_a_checkpoint_and_a_checkpoint_can_be_tested(tmp_path, capsys):
    def run(version, *options):
        fit(*SHORT, f"--trainer.logger.init_args.version={version}", *options)
        rows = csv.DictReader(open(tmp_path / "runs" / "digits" / "dfc" / f"version_{version}" / "metrics.csv"))
        return {int(row["epoch"]): row["val/loss"] for row in rows if row["val/loss"]}

    last = tmp_path / "runs" / "digits" / "dfc" / "version_0" / "checkpoints" / "last.ckpt"
    assert list(run(0)) == [0]
    assert list(run(1, f"--ckpt_path={last}", "--trainer.max_epochs=2")) == [1]
    cli.main(["test", f"--config={DIGITS}", *QUIET, f"--ckpt_path={last}"])
    assert "test/error" in capsys.readouterr().out


def test_validate_runs(capsys):
    cli.main(["validate", f"--config={DIGITS}", *QUIET])
    assert "val/error" in capsys.readouterr().out


def test_options_on_the_command_line_reach_nested_fields(capsys):
    given = config(
        capsys,
        f"{RULE}.init_args.controller.k_p=1.5",
        f"{RULE}.init_args.settling.init_args.steps=50",
        "--trainer.strategy.init_args.feedback.method.init_args.sigma=0.2",
        "--trainer.max_epochs=5",
        "--data.init_args.root=elsewhere",
        recipe=RECIPES / "mnist" / "dfc.yaml",
    )
    strategy = given["trainer"]["strategy"]["init_args"]
    rule = strategy["rule"]["init_args"]
    assert rule["controller"]["k_p"] == 1.5 and rule["controller"]["leak"] == "control"
    assert rule["settling"]["init_args"]["steps"] == 50 and rule["settling"]["init_args"]["dt"] == 0.02
    assert strategy["feedback"]["method"]["init_args"]["sigma"] == 0.2
    assert given["trainer"]["max_epochs"] == 5 and given["data"]["init_args"]["root"] == "elsewhere"
    assert given["seed_everything"] == 0


@pytest.fixture
def made(monkeypatch):
    """The strategy that a fit would train by."""
    monkeypatch.setattr(cli.RecipeCLI, "_run_subcommand", lambda self, command: None)
    return lambda *options, recipe=DIGITS: (
        cli.RecipeCLI(["fit", f"--config={recipe}", *QUIET, *options]).trainer.strategy
    )


BP, FEEDBACK = RECIPES / "digits" / "bp.yaml", "--trainer.strategy.init_args.feedback"


@pytest.mark.parametrize(
    ("options", "recipe", "rule", "changed"),
    [
        ([f"{FEEDBACK}.initial_passes=3"], DIGITS, None, {"initial_passes": 3}),
        ([f"{FEEDBACK}={{lr: 0.1}}"], DIGITS, None, {"lr": 0.1}),
        ([f"{RULE}=DFC", f"{FEEDBACK}.lr=0.1"], DIGITS, DFC(), {"lr": 0.1}),
        (
            [f"{FEEDBACK}.lr=0.1", f"{RULE}=DFC", f"{RULE}.init_args.clamped=true"],
            DIGITS,
            DFC(clamped=True),
            {"lr": 0.1},
        ),
        (["--trainer.strategy=DFCStrategy", f"{FEEDBACK}.lr=0.1"], BP, None, {"lr": 0.1}),
        (["--trainer.strategy", "dfc_lightning.DFCStrategy", f"{FEEDBACK}.lr=0.1"], BP, None, {"lr": 0.1}),
        (["--trainer.strategy=dfc"], BP, None, {}),
    ],
)
def test_an_option_changes_one_field_of_what_the_rule_has_by_default(made, options, recipe, rule, changed):
    default = DFCStrategy(rule=rule)
    found = made(*options, recipe=recipe)
    assert found.rule == default.rule and found.learning == replace(default.learning, **changed)


def test_a_field_in_a_config_changes_that_field_and_no_other(made, tmp_path):
    text = "trainer: {strategy: {class_path: dfc_lightning.DFCStrategy, init_args: {feedback: {eps: 1e-3}}}}"
    (tmp_path / "eps.yaml").write_text(text)
    assert made("--config=eps.yaml").learning == replace(DFCStrategy().learning, eps=1e-3)
    assert made("--config=eps.yaml", recipe=BP).learning == replace(DFCStrategy().learning, eps=1e-3)


def test_a_rule_with_no_feedback_to_learn_gets_none(made):
    assert made(recipe=RECIPES / "digits" / "dfa.yaml").learning is None


@pytest.mark.parametrize("options", [[], ["--trainer.strategy=dfc"]])
def test_what_is_in_effect_is_saved_and_gives_the_same_again(made, tmp_path, capsys, options):
    text = yaml.safe_dump(config(capsys, *options))
    (tmp_path / "saved.yaml").write_text(text)
    strategy = yaml.safe_load(text)["trainer"]["strategy"]["init_args"]
    assert strategy["rule"]["class_path"].endswith(type(DFCStrategy().rule).__name__)
    assert strategy["feedback"]["lr"] == DFCStrategy().learning.lr
    again = made(recipe="saved.yaml")
    assert (again.rule, again.learning) == (DFCStrategy().rule, DFCStrategy().learning)


class Keeping(Logger):
    """Keeps what it is given, as trackers do."""

    kept: ClassVar[list] = []
    name, version, experiment = "keeping", "0", None

    def log_hyperparams(self, params, *args, **kwargs):
        self.kept.append(params)

    def log_metrics(self, metrics, step=None): ...


def test_trackers_are_given_what_is_in_effect():
    fit(*SHORT, f"--trainer.logger={Keeping.__module__}.Keeping", "--trainer.default_root_dir=.")
    strategy = Keeping.kept[-1]["trainer"]["strategy"]["init_args"]
    assert strategy["feedback"]["lr"] == DFCStrategy().learning.lr and strategy["rule"] is not None


def test_our_classes_go_by_their_bare_names_and_the_strategy_by_its_own(capsys):
    given = config(capsys, f"{RULE}=DFC", f"{RULE}.init_args.settling=Euler", "--data=MNIST", "--model=Regressor")
    rule = given["trainer"]["strategy"]["init_args"]["rule"]
    assert rule["class_path"] == "dfc_lightning.DFC"
    assert rule["init_args"]["settling"]["class_path"] == "dfc_lightning.settling.Euler"
    assert given["data"]["class_path"] == "dfc_lightning.data.MNIST"
    assert given["model"]["class_path"] == "dfc_lightning.models.Regressor"
    assert config(capsys, "--trainer.strategy=dfc")["trainer"]["strategy"]["class_path"] == "dfc_lightning.DFCStrategy"
    fit(*QUIET, "--trainer.strategy=dfc", "--trainer.fast_dev_run=1")


def test_a_second_config_overrides_the_first(tmp_path, capsys):
    (tmp_path / "more.yaml").write_text("trainer:\n  max_epochs: 7\n")
    trainer = config(capsys, "--config=more.yaml")["trainer"]
    assert trainer["max_epochs"] == 7 and trainer["strategy"]["class_path"] == "dfc_lightning.DFCStrategy"


def test_a_recipe_is_laid_over_its_bases(tmp_path, capsys):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "short.yaml").write_text("trainer:\n  max_epochs: 7\n  log_every_n_steps: 3\n")
    more = f"base: [{DIGITS}, ../shared/short.yaml]\ntrainer:\n  max_epochs: 9\nmodel:\n  init_args:\n    optimizer:\n"
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.yaml").write_text(more + "      init_args:\n        lr: 1e-2\n")
    given = config(capsys, recipe="own/mine.yaml")
    assert given["trainer"]["max_epochs"] == 9 and given["trainer"]["log_every_n_steps"] == 3
    assert given["trainer"]["strategy"]["class_path"] == "dfc_lightning.DFCStrategy"
    assert given["model"]["init_args"]["optimizer"]["class_path"] == "torch.optim.Adam"
    assert given["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.01
    assert "base" not in given
    (tmp_path / "more.yaml").write_text("trainer:\n  max_epochs: 2\n")
    assert config(capsys, "--config=more.yaml", recipe="own/mine.yaml")["trainer"]["max_epochs"] == 2


def test_a_second_config_replaces_the_logger_of_a_composed_recipe(tmp_path, capsys):
    logger = "lightning.pytorch.loggers.TensorBoardLogger"
    (tmp_path / "more.yaml").write_text(f"trainer:\n  logger:\n    class_path: {logger}\n    init_args: {{name: x}}\n")
    given = config(capsys, "--config=more.yaml", recipe=RECIPES / "mnist" / "dfc_ss.yaml")["trainer"]["logger"]
    assert given["class_path"] == logger and given["init_args"]["name"] == "x"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            {"a.yaml": "base: b.yaml", "b.yaml": "base: [a.yaml]"},
            r"base='a.yaml' in b.yaml leads back.*a.yaml -> b.yaml",
        ),
        ({"a.yaml": "base: none.yaml"}, r"base='none.yaml' in a.yaml: there is no such file.*relative"),
        ({"a.yaml": "base: b.yaml", "b.yaml": "base: none.yaml"}, r"base='none.yaml' in b.yaml: there is no such file"),
        ({"a.yaml": "base: {b: 1}"}, r"base=.*in a.yaml: give the path"),
        ({"a.yaml": "base: b.yaml", "b.yaml": "just words"}, r"b.yaml holds no settings"),
    ],
)
def test_a_base_that_cannot_be_had_is_named(tmp_path, capsys, files, words):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as stopped:
        fit(recipe="a.yaml")
    assert stopped.value.code == 2 and re.search(words, capsys.readouterr().err, re.DOTALL)


@pytest.mark.parametrize(
    ("base", "top", "merged"),
    [
        ({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 4}}, {"a": 1, "b": {"c": 2, "d": 4}}),
        ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
        ({"a": {"b": 1}}, {"a": None}, {"a": None}),
        (
            {"a": {"class_path": "X", "init_args": {"n": 1}}},
            {"a": {"class_path": "Y"}},
            {"a": {"class_path": "Y"}},
        ),
        (
            {"a": {"class_path": "X", "init_args": {"n": 1}}},
            {"a": {"class_path": "X", "init_args": {"m": 2}}},
            {"a": {"class_path": "X", "init_args": {"n": 1, "m": 2}}},
        ),
        (
            {"a": {"init_args": {"n": 1}}},
            {"a": {"class_path": "X", "init_args": {"m": 2}}},
            {"a": {"class_path": "X", "init_args": {"m": 2}}},
        ),
    ],
)
def test_merging_replaces_all_but_mappings_and_another_class_whole(base, top, merged):
    assert composition.merge(base, top) == merged


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--trainer.max_epoch=3"], "--trainer.max_epoch=3"),
        (["--trainer.max_epochs=many"], "--trainer.max_epochs: 'many' .*int"),
        ([f"{RULE}=DFC", f"{RULE}.init_args.controler.k_p=1"], "--trainer.strategy.rule: .*--controler.k_p=1"),
        (
            [f"{RULE}=DFC", f"{RULE}.init_args.controller.k_p=high"],
            "--trainer.strategy.rule.controller.k_p: 'high' .*float",
        ),
        ([f"{RULE}=DFC", f"{RULE}.init_args.controller.k_p=-1"], rf"{RULE}.init_args.controller.k_p: k_p=-1.0 .*zero"),
        ([f"{RULE}=DFC", f"{RULE}.init_args.integrate=true"], rf"{RULE}.init_args.integrate: .*Euler"),
        ([f"{RULE}=DFD"], "--trainer.strategy.rule: .*DFD"),
        (["--model.init_args.network.init_args.nonlinearity=tan"], "--model.*.nonlinearity: .*'tan' .*tanh"),
        (["--data.init_args.validation_size=2000"], "validation_size=2000"),
        (["--trainer.strategy=dfx"], "strategy='dfx'"),
        (["--trainer.devices=2"], "devices=2 .*one device"),
    ],
)
def test_a_bad_option_is_named(capsys, options, words):
    code, said = refusal(capsys, *QUIET, *options)
    assert code == 2 and re.search(words, said, re.DOTALL), said
    assert "Traceback" not in said and "usage:" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--trainer.strategy.init_args.network=encoder"], "network='encoder' is no submodule"),
        (["--trainer.callbacks.monitor=val/eror"], "monitor='val/eror'"),
        (["--ckpt_path=nowhere.ckpt"], "nowhere.ckpt"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_a_sentence(capsys, options, words):
    code, said = refusal(capsys, *SHORT, *options)
    assert code == 1 and said.startswith("error: ") and words in said and len(said) < 1000


def test_missing_data_is_named_with_its_remedy(tmp_path, capsys, monkeypatch):
    pytest.importorskip("torchvision")
    from torchvision import datasets

    def offline(*args, **kwargs):
        raise RuntimeError("no network")

    monkeypatch.setattr(datasets, "MNIST", offline)
    code, said = refusal(capsys, *SHORT, "--data=MNIST", "--data.init_args.root=nowhere")
    assert code == 1
    assert re.match("error: MNIST: train-images.*--data.init_args.root", said, re.DOTALL)


def test_an_unforeseen_error_keeps_its_traceback(monkeypatch):
    def broken(self):
        raise KeyError("broken")

    monkeypatch.setattr("dfc_lightning.data.Digits.train_dataloader", broken)
    with pytest.raises(KeyError, match="broken"):
        fit(*SHORT)


def test_without_jsonargparse_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setattr(cli, "RequirementCache", lambda requirement: False)
    with pytest.raises(SystemExit, match=re.escape('pip install "dfc_lightning[recipes]"')):
        cli.main(["fit", f"--config={DIGITS}"])


@pytest.mark.slow
def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "dfc_lightning", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"})
    assert done.returncode == 0 and "usage: dfc" in done.stdout
    for name in ("fit", "validate", "test", "list", "resume", "doctor"):
        assert name in done.stdout
