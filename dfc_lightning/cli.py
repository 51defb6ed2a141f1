"""The ``dfc`` command: ``dfc fit --config recipes/digits/dfc.yaml``."""

from __future__ import annotations

import sys
from importlib import import_module

from lightning.pytorch.cli import ArgsType
from lightning_utilities.core.imports import RequirementCache

from dfc_lightning.commands import COMMANDS
from dfc_lightning.commands.ending import ending_in_a_sentence
from dfc_lightning.experiments.recipe_cli import RecipeCLI

_EXTRA = 'pip install "dfc_lightning[recipes]"'


def _description() -> str:
    others = "; ".join(f"dfc {name}: {purpose}" for name, purpose in COMMANDS.items())
    return "Train by Deep Feedback Control and other learning rules." + (f" Also: {others}." if others else "")


def main(args: ArgsType = None) -> None:
    """Run the ``dfc`` command.

    Args:
        args: what follows the command's name, as a list of words; None for that of the process.
    """
    words = list(sys.argv[1:] if args is None else args) if not isinstance(args, dict) else []
    ours = bool(words) and words[0] in COMMANDS
    with ending_in_a_sentence(words, resumes_itself=ours and words[0] != "resume"):
        if not RequirementCache("jsonargparse[signatures]>=4.28"):
            sys.exit(f"error: the dfc command needs jsonargparse, which is not installed: {_EXTRA}")
        if ours:
            import_module(f"dfc_lightning.commands.{words[0]}").main(words[1:])
        else:
            RecipeCLI(args, description=_description())
