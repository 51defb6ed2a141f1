"""The commands of ``dfc``: Lightning's own, on recipes, and those beside them, one module each.

The module of such a command has ``main(args: Sequence[str]) -> None``, given the words after the command's name.
"""

from __future__ import annotations

FITTING: dict[str, str] = {
    "fit": "train by a recipe, and test its best epoch",
    "validate": "validate a checkpoint of a recipe's run",
    "test": "test a checkpoint of a recipe's run",
}
"""Each of Lightning's commands, and a line on what it does."""

COMMANDS: dict[str, str] = {
    "list": "the recipes, what to expect of them, and their price",
    "resume": "go on with a run that was stopped",
    "plot": "draw figures of runs, and of the paper",
    "compare": "recipes or finished runs in one table and one figure",
    "reproduce": "run what is missing of the published table",
    "report": "our results beside the published table",
    "doctor": "what is installed and found here, and what to do about what is missing",
    "completion": "a script by which bash or zsh completes these, and the names of recipes",
}
"""Each command's name, also that of its module here, and a line on what it does."""

WITHOUT_PARSER = ("list", "plot", "report", "doctor", "completion")
"""Commands that do without jsonargparse."""
