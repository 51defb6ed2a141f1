"""Lightning's command line for recipes: ``dfc fit``, ``validate`` and ``test``."""

from __future__ import annotations

import re
import sys
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

# Imported classes can be given by their bare names, e.g. --trainer.strategy.init_args.rule=DFC.
from dfc_lightning import data, models, settling  # noqa: F401
from dfc_lightning.callbacks import ChooseThreads
from dfc_lightning.experiments.checkpoints import require_checkpoint
from dfc_lightning.experiments.errors import RecipeError, Stopped, stopping_signal
from dfc_lightning.experiments.going_on import GoesOn, folder_of, logged_in, named, roots, rows_before, take_up
from dfc_lightning.experiments.in_effect import SaveConfig, laid, layers, without_printing
from dfc_lightning.experiments.leaving import SaveOnLeaving
from dfc_lightning.experiments.published import Published
from dfc_lightning.experiments.recipe_parser import RecipeParser, bounded_reading
from dfc_lightning.experiments.recipe_words import with_recipes
from dfc_lightning.experiments.refused import told
from dfc_lightning.experiments.versions import claim_version

_RECIPES = "--recipe NAME takes one of those that dfc list names; --config FILE one of yours, or what to lay over it."
_TOLD = {
    "fit": f"Train by a recipe, and test the best validation epoch. {_RECIPES}",
    "validate": f"Validate --ckpt_path, a file, or best or last of the recipe's newest run. {_RECIPES}",
    "test": f"Test --ckpt_path, a file, or best or last of the recipe's newest run. {_RECIPES}",
}


class RecipeCLI(LightningCLI):
    """Lightning's command line, with ``fit`` ending in a test at the best validation epoch.

    Args:
        args: what follows the command's name; None for that of the process.
        callbacks: callbacks beside the config's.
        exit_on_error: whether a refused option ends the process, or is raised as a :class:`RecipeError`.
        description: what ``--help`` says of the command.
        resumes: whether a fit goes on in the folder of its checkpoint's run, wherever the config would have it.
    """

    saves_on_leaving = True
    """Whether a fit that is stopped saves a checkpoint of that moment."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, but for ``predict``: what is to be made of predictions, no recipe says."""
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name != "predict"}

    def __init__(
        self,
        args: ArgsType = None,
        callbacks: Sequence[Callback] = (),
        exit_on_error: bool = True,
        description: str = "Train by Deep Feedback Control and other learning rules.",
        resumes: bool = False,
    ) -> None:
        self._resumes = resumes
        self._run: tuple[Path, list[dict[str, str]]] | None = None  # to go on with: its folder, and rows to keep
        self._leaving = [SaveOnLeaving()] if self.saves_on_leaving else []
        self._failure: Exception | None = None
        self._claimed: list[Path] = []
        every = {name: {"exit_on_error": exit_on_error, "description": _TOLD[name]} for name in self.subcommands()}
        with self._ending(), bounded_reading():
            super().__init__(
                pl.LightningModule,
                save_config_callback=SaveConfig,
                save_config_kwargs={"overwrite": True},
                trainer_defaults={"callbacks": [*callbacks, *self._leaving]},
                seed_everything_default=0,
                parser_kwargs={"prog": "dfc", "exit_on_error": exit_on_error, "description": description} | every,
                parser_class=RecipeParser,
                subclass_mode_model=True,
                subclass_mode_data=True,
                args=args,
                auto_configure_optimizers=False,
            )

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """Say which option is refused and, where a signal stops the run, what to go on from."""
        try:
            yield
        except ArgumentError as error:
            raise RecipeError(told(str(error))) from error
        except (KeyboardInterrupt, SystemExit) as error:
            number = stopping_signal(error)
            if number is None:
                raise
            raise Stopped(number, self._last_checkpoint()) from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let a recipe say what it should reach, and a person how many threads to take."""
        parser.add_argument("--expected", type=Published | None, default=None, help="what the recipe should reach")
        parser.add_argument(
            "--threads", type=int | None, default=None, help="threads on a CPU; null to measure what suits the network"
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and see that the checkpoint is there and can be opened."""
        if isinstance(args, (dict, Namespace)):
            super().parse_arguments(parser, args)
        else:
            self.config = self._parsed(parser, list(sys.argv[1:] if args is None else args))
        command = self.config.get("subcommand")
        if command:
            self._find_checkpoint(command, self.config[command])

    def _find_checkpoint(self, command: str, options: Namespace) -> None:
        path = options.get("ckpt_path")
        if path == "last" or (path == "best" and command != "fit"):
            options["ckpt_path"] = path = str(named(path, roots(options.trainer)))
        if not path or not Path(path).is_file():
            return
        checkpoint, run = require_checkpoint(Path(path)), folder_of(Path(path))
        own = self._resumes or (run is not None and run.parent in [root.resolve() for root in roots(options.trainer)])
        if command == "fit" and run is not None and own:
            self._run = run, rows_before(run, checkpoint)
            self.trainer_defaults["callbacks"].append(GoesOn())

    def _parsed(self, parser: LightningArgumentParser, words: list[str]) -> Namespace:
        """What the words say, laid over what is in effect where they are silent, which is known by parsing them."""
        words = with_recipes(words)
        silent = without_printing(words)
        config = parser.parse_args(silent)
        command = config.get("subcommand")
        if not command:
            return config
        at = words.index(command) + 1
        whole = [*words[:at], *laid(layers(config[command].trainer.strategy), words[at:])]
        return config if whole == silent else parser.parse_args(whole)

    def _parse_ckpt_path(self) -> None:
        """Let no checkpoint choose, by its hyperparameters, what is imported: the config says all."""

    def before_instantiate_classes(self) -> None:
        """See which class refuses its arguments; let no checkpoint run code; give each run's logger its own folder."""
        options = self.config[self.subcommand]
        if options.get("weights_only", True) is None:
            options["weights_only"] = True
        try:
            self.trainer_defaults["callbacks"].append(ChooseThreads(options.threads))
        except ValueError as error:
            self._parser(self.subcommand).error(f"--{error}")

        def build(class_type: type, *args: Any, **kwargs: Any) -> Any:
            try:
                return class_type(*args, **self._versioned(class_type, kwargs))
            except Exception as error:
                self._failure = error
                raise

        self.parser.add_instantiator(build, object)

    def _versioned(self, class_type: type, arguments: dict[str, Any]) -> dict[str, Any]:
        """A logger's arguments, its version claimed now: left to the logger, two runs begun at once would share it."""
        if not issubclass(class_type, (CSVLogger, TensorBoardLogger)) or arguments.get("version") is not None:
            return arguments
        save_dir = str(arguments.get("save_dir", ""))
        if self.config[self.subcommand].trainer.fast_dev_run or getattr(rank_zero_only, "rank", 0) or "://" in save_dir:
            return arguments
        root = Path(save_dir) / (arguments.get("name", "lightning_logs") or "")
        if self._run is not None:
            return {**arguments, **logged_in(self._run[0], root)}
        number = claim_version(root)
        self._claimed.append(root / f"version_{number}")
        return {**arguments, "version": number}

    def instantiate_classes(self) -> None:
        """Build trainer, model and data; arguments they refuse end the command with code 2."""
        try:
            super().instantiate_classes()
        except Exception as error:
            for folder in self._claimed:
                folder.rmdir()
            if isinstance(self._failure, OSError):  # wrapped by the parser as a refused value
                raise self._failure from error
            if not isinstance(error, (ValueError, MisconfigurationException)):
                raise
            cause: BaseException = self._failure or error
            while self._failure is None and cause.__cause__ is not None:
                cause = cause.__cause__
            if not isinstance(cause, (ValueError, MisconfigurationException, ImportError)):
                raise
            self._parser(self.subcommand).error(self._with_option(str(cause)))

    def after_instantiate_classes(self) -> None:
        """Have the run that goes on keep its curves."""
        if self._run is not None and self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            take_up(self.trainer.loggers, *self._run)

    def _with_option(self, message: str) -> str:
        """Put the option's full name before a message that begins with ``argument=value``."""
        named = re.match(r"(\w+)=(\S+)", message)
        if named is None:
            return message
        given = self.config[self.subcommand].items()
        options = [key for key, value in given if key.endswith(f".{named[1]}") and repr(value) == named[2]]
        return f"--{options[0]}: {message}" if options else message

    def _last_checkpoint(self) -> str | None:
        """What was saved on leaving, or else the newest of the files that checkpoint callbacks have kept."""
        for saved in (each.path for each in self._leaving):
            if saved is not None:
                return str(saved)
        trainer: pl.Trainer | None = getattr(self, "trainer", None)
        kept = list(trainer.checkpoint_callbacks if trainer else ())
        paths = [getattr(callback, name, "") for callback in kept for name in ("last_model_path", "best_model_path")]
        there = [path for path in paths if path and Path(path).is_file()]
        return max(there, key=lambda path: Path(path).stat().st_mtime, default=None)

    def before_validate(self) -> None:
        """Tell if there is nothing to validate."""
        self._tell_untrained("validated")

    def before_test(self) -> None:
        """Tell if there is nothing to test."""
        self._tell_untrained("tested")

    def _tell_untrained(self, what: str) -> None:
        if not self.config[self.subcommand].get("ckpt_path"):
            rank_zero_warn(
                f"There is no --ckpt_path: what is {what} are the weights that training would begin with. Give the "
                "path of a checkpoint, or --ckpt_path=best for that of the recipe's newest run."
            )

    def after_fit(self) -> None:
        """Test the checkpoint of the best validation epoch, or else the final weights."""
        expected: Published | None = self._get(self.config_init, "expected")
        trained = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        last = self.trainer.current_epoch - 1
        loaders = [source for source in (self.datamodule, self.model) if is_overridden("test_dataloader", source)]
        if not loaders or not is_overridden("test_step", self.model):
            return
        best = _best_checkpoint(self.trainer)
        path = None if best is None else best.best_model_path
        results = self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=path, verbose=False)
        if not self.trainer.is_global_zero or not results or not results[0]:
            return
        figures, when = results[0], "final weights"
        if best is not None and path is not None and best.best_model_score is not None:
            epoch = self.trainer.strategy.checkpoint_io.load_checkpoint(path)["epoch"]
            when = f"best validation epoch {epoch}, {best.monitor} {float(best.best_model_score):.4g}"
            headline = str(best.monitor).replace("val", "test", 1)
            figures = {headline: figures[headline]} if headline in figures else figures
        if expected is not None and expected.metric in trained:  # a figure of training has no best validation epoch
            figures, when = {expected.metric: trained[expected.metric]}, f"epoch {last}"
        reached = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        print(f"{reached} ({when})" + (f"; published {expected}" if expected and expected.metric in figures else ""))


def _best_checkpoint(trainer: pl.Trainer) -> ModelCheckpoint | None:
    """The first checkpoint callback that monitors a metric and has kept a best one."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_path:
            return callback
    return None
