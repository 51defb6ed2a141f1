"""The commands of ``dfc`` beside Lightning's own (``fit``, ``validate``, ``test``, ``predict``): one module each.

A command's module has ``main(args: Sequence[str]) -> None``, given the words after the command's name.
"""

from __future__ import annotations

COMMANDS: dict[str, str] = {}
"""Each command's name, also that of its module here, and a line on what it does."""
