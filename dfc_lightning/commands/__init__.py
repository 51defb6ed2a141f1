"""The commands of ``dfc`` beside Lightning's own (``fit``, ``validate``, ``test``, ``predict``): one module each.

A command's module has ``main(args: Sequence[str]) -> None``, given the words after the command's name.
"""

from __future__ import annotations

COMMANDS: dict[str, str] = {
    "resume": "go on with a run that was stopped",
    "plot": "draw figures of runs, and of the paper",
    "reproduce": "run what is missing of the published table",
    "report": "our results beside the published table",
    "compare": "recipes or finished runs in one table and one figure",
}
"""Each command's name, also that of its module here, and a line on what it does."""
