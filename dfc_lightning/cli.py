"""The ``dfc`` command: ``dfc fit --recipe digits/dfc``."""

from __future__ import annotations

import difflib
import os
import sys
from importlib import import_module

from lightning.pytorch.cli import ArgsType
from lightning_utilities.core.imports import RequirementCache

from dfc_lightning.commands import COMMANDS, FITTING, WITHOUT_PARSER
from dfc_lightning.commands.ending import ending_in_a_sentence
from dfc_lightning.commands.noise import without_noise

try:
    from dfc_lightning.experiments.recipe_cli import RecipeCLI
except ModuleNotFoundError as error:
    if error.name != "jsonargparse":  # said once the command is known: some do without
        raise

_EXTRA = 'pip install "dfc_lightning[recipes]"'


def main(args: ArgsType = None) -> None:
    """Run the ``dfc`` command.

    Args:
        args: what follows the command's name, as a list of words; None for that of the process.
    """
    words = list(sys.argv[1:] if args is None else args) if not isinstance(args, dict) else []
    if not isinstance(args, dict) and _answered(words):
        return
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for --model=mine.Model, as python -m has it
    ours = bool(words) and words[0] in COMMANDS
    with ending_in_a_sentence(words, resumes_itself=ours and words[0] != "resume"), without_noise():
        parses = not ours or words[0] not in WITHOUT_PARSER
        if parses and not RequirementCache("jsonargparse[signatures]>=4.51"):
            sys.exit(f"error: the dfc command needs jsonargparse 4.51 or later: {_EXTRA}")
        if ours:
            import_module(f"dfc_lightning.commands.{words[0]}").main(words[1:])
        else:
            RecipeCLI(args)


def _answered(words: list[str]) -> bool:
    """Whether all that is asked is what there is; what is no command, or lacks a recipe, ends the process."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return True
    if words[0] in ("-V", "--version", "version"):
        print(_version())
        return True
    if words[0] in FITTING:
        named = ("--config", "-c", "--recipe", "--model", "-h", "--help", "--print_")
        if not any(word.startswith(named) for word in words[1:]):
            command = f"dfc {words[0]}"
            sys.exit(_refused(f"{command} needs a recipe: {command} --recipe digits/dfc, or --config FILE", "dfc list"))
    elif words[0] not in COMMANDS and not words[0].startswith("-"):
        near = difflib.get_close_matches(words[0], [*FITTING, *COMMANDS], 1)
        asked = f" Did you mean dfc {near[0]}?" if near else ""
        sys.exit(_refused(f"dfc has no command {words[0]!r}.{asked}", "dfc --help"))
    return False


def _refused(message: str, listing: str) -> int:
    what = {"dfc list": "names the recipes", "dfc --help": "names the commands"}[listing]
    print(f"error: {message}\ntip: {listing} {what}.", file=sys.stderr)
    return 2


def _overview() -> str:
    width = max(map(len, [*FITTING, *COMMANDS])) + 2
    commands = "\n".join(f"  {name:{width}}{purpose}" for name, purpose in (FITTING | COMMANDS).items())
    return (
        "usage: dfc COMMAND [options]\n\nTrain by Deep Feedback Control and other learning rules.\n\n"
        f"{commands}\n\nFirst: dfc fit --recipe digits/dfc. Of each command: dfc COMMAND --help."
    )


def _version() -> str:
    import lightning
    import torch

    import dfc_lightning

    return f"dfc_lightning {dfc_lightning.__version__} (torch {torch.__version__}, lightning {lightning.__version__})"
