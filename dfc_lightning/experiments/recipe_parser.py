"""Parsing of recipes and options: full names, bounded files, and what is wrong in a few lines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import yaml
from lightning.pytorch.cli import LightningArgumentParser

from dfc_lightning.experiments.composition import BASE, composed
from dfc_lightning.experiments.reading import CompositionError, check_bounds, parse_settings
from dfc_lightning.experiments.recipe_words import with_our_classes
from dfc_lightning.experiments.refused import told


class RecipeParser(LightningArgumentParser):
    """Takes options by their full names only, and says what is wrong without a page of usage before it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_string(self, content: str, path: Any = "", *args: Any, **kwargs: Any) -> Any:
        """Parse a config, laid over its bases; relative to the working directory, which is the file's meanwhile."""
        name = str(path) or "the config"
        try:
            tree = parse_settings(content, name)
            if isinstance(tree, dict):
                whole = with_our_classes(composed(tree, ".", name) if BASE in tree else tree)
                if whole != tree:
                    content = yaml.safe_dump(whole, sort_keys=False)
        except CompositionError as error:
            self.error(str(error), error)
        return super().parse_string(content, path, *args, **kwargs)

    def parse_path(self, cfg_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Parse a config's file."""
        try:
            return super().parse_path(cfg_path, *args, **kwargs)
        except UnicodeDecodeError as error:
            self.error(f"--config={cfg_path}: it is no text ({error.reason}); give a recipe in YAML.", error)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and exit with code 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        command = getattr(ex, "subcommand_parser", None) or self
        program = command.prog.replace(" [options]", "")
        self.exit(
            2, f"error: {told(message, command._option_string_actions)}\ntip: {program} --help lists the options.\n"
        )


@contextmanager
def bounded_reading() -> Iterator[None]:
    """Hold files that options name, and options themselves, to the bounds of recipes."""
    from jsonargparse import get_loader, set_loader

    load = get_loader("yaml")

    def bounded(text: str) -> Any:
        check_bounds(text, "a file or an option")
        return load(text)

    set_loader("yaml", bounded, (yaml.YAMLError,))
    try:
        yield
    finally:
        set_loader("yaml", load, (yaml.YAMLError,))
