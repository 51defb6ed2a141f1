"""What a strategy of ours does where a recipe is silent, in the recipe's own words.

Laid under a recipe, these let an option change one field and no other: the fields beside it are those of the rule that
the recipe ends up with, not those of ``FeedbackLearning()``. So ``config.yaml`` and loggers hold what is in effect.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any, NamedTuple, get_type_hints

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import StrategyRegistry
from typing_extensions import override

from dfc_lightning.network.learning_rule import LearningRule
from dfc_lightning.training.controlled import ControlledTraining
from dfc_lightning.training.strategy import DFCStrategy

_STRATEGY = "--trainer.strategy"


class Layers(NamedTuple):
    """Options to be put before and after those that are given."""

    below: list[str]
    above: list[str]


def layers(strategy: Any) -> Layers:
    """What to lay under, or over, the options that have led to ``strategy``.

    Args:
        strategy: as parsed: a name, a mapping with ``class_path`` and ``init_args``, or None.
    """
    if isinstance(strategy, str):
        known: dict[str, Any] = StrategyRegistry[strategy] if strategy in StrategyRegistry else {"strategy": object}
        if not issubclass(known["strategy"], ControlledTraining):
            return Layers([], [])
        own = [f"{_STRATEGY}.init_args.{name}={value}" for name, value in known["init_params"].items()]
        return Layers([], [f"{_STRATEGY}={_path(known['strategy'])}", *own, *_spelled(None)])
    path = strategy.get("class_path") if strategy is not None and hasattr(strategy, "get") else None
    if path is None or not issubclass(_imported(path), ControlledTraining):
        return Layers([], [])
    given = (strategy.get("init_args") or {}).get("rule")
    return Layers([f"{_STRATEGY}={path}", *_spelled(given)], [])


def _spelled(rule: Any) -> list[str]:
    """The rule, where none is given, and its own feedback learning, as options."""
    try:
        made = _made(rule)
    except Exception:  # refused later, with a sentence
        return []
    strategy = DFCStrategy(rule=made)
    found = {"rule": spelled_out(strategy.rule, LearningRule)} if made is None else {}
    if strategy.learning is not None:
        found["feedback"] = spelled_out(strategy.learning, type(strategy.learning))
    return [f"{_STRATEGY}.init_args.{name}={_written(value)}" for name, value in found.items()]


def _made(rule: Any) -> LearningRule | None:
    if rule is None:
        return None
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--rule", type=LearningRule)
    return parser.instantiate_classes(parser.parse_object({"rule": rule})).rule


def spelled_out(value: Any, declared: Any) -> Any:
    """A dataclass as a recipe has it: with its class, unless that is the one which is ``declared`` for its place.

    Fields that no recipe can hold are left out.
    """
    if not is_dataclass(value) or isinstance(value, type):
        return list(value) if isinstance(value, tuple) else value
    hints = get_type_hints(type(value))
    found = {f.name: (getattr(value, f.name), hints.get(f.name)) for f in fields(value) if f.init}
    own = {name: spelled_out(each, hint) for name, (each, hint) in found.items() if _can_be_written(each)}
    kind = type(value)
    return own if kind is declared else {"class_path": _path(kind), "init_args": own}


def _can_be_written(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_can_be_written, value))
    return value is None or is_dataclass(value) or isinstance(value, (bool, int, float, str))


def _written(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).strip()


def _path(kind: type) -> str:
    """Where it is imported from: the outermost package that offers it."""
    parts = kind.__module__.split(".")
    packages = (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    offers = (p for p in packages if getattr(sys.modules.get(p), kind.__name__, None) is kind)
    return f"{next(offers, kind.__module__)}.{kind.__qualname__}"


def _imported(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def laid(layers: Layers, words: Sequence[str]) -> list[str]:
    """The words of a subcommand with the layers; one that names the strategy's class resets its arguments."""
    found = [*layers.below]
    for before, word in zip(["", *words], words):
        found.append(word)
        name = word.removeprefix(f"{_STRATEGY}=") if word.startswith(f"{_STRATEGY}=") else None
        name = word if before == _STRATEGY else name
        if name is not None and not name.startswith("{"):
            found += layers.below
    return [*found, *layers.above]


def without_printing(words: Sequence[str]) -> list[str]:
    """The words without what has the config printed."""
    return [word for word in words if word != "--print_config" and not word.startswith("--print_config=")]


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml``, and gives what it holds to loggers that keep hyperparameters."""

    @override
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.config = self.config.clone()
        self.config["ckpt_path"] = None  # of this attempt, not of the run
        self.save_to_log_dir = trainer.log_dir is not None  # None: of loggers that keep no files
        super().setup(trainer, pl_module, stage)

    @override
    def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
        settings = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger):  # whose folder has config.yaml
                logger.log_hyperparams({k: v for k, v in settings.items() if k not in ("config", "ckpt_path")})
