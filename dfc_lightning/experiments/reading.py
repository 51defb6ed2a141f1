"""Reading recipes within bounds: a few lines of YAML can stand for more settings than fit in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MAX_CHARACTERS = 1_000_000
MAX_DEPTH = 50
MAX_SETTINGS = 10_000
"""Keys and values, those an alias stands for counted each time."""

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class CompositionError(ValueError):
    """A recipe that cannot be read, or whose bases cannot be had."""


def read_settings(path: Path) -> Any:
    """The settings in a file.

    Raises:
        CompositionError: they are no YAML, or beyond the bounds; or the file is none.
    """
    if not path.is_file():
        raise CompositionError(f"{path} is no file: give the path of a recipe.")
    if path.stat().st_size > MAX_CHARACTERS:
        raise CompositionError(f"{path} is larger than {MAX_CHARACTERS:,} bytes: is it a recipe? Give a shorter one.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CompositionError(f"{path} is no text ({error.reason}): give a recipe in YAML.") from error
    return parse_settings(text, str(path))


def parse_settings(text: str, name: str) -> Any:
    """The settings in a text.

    Args:
        text: the text.
        name: what to call it in errors.

    Raises:
        CompositionError: it is no YAML, or beyond the bounds.
    """
    try:
        check_bounds(text, name)
        return yaml.load(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: dates and numbers that look like one and are none
        if isinstance(error, CompositionError):
            raise
        raise CompositionError(f"{name} is no valid YAML: {' '.join(str(error).split())}. Correct it.") from error


def check_bounds(text: str, name: str) -> None:
    """Refuse what would take long to build, from the parser's events, before anything is built.

    Raises:
        CompositionError: the text is beyond the bounds, or an alias in it leads back to itself.
        yaml.YAMLError: it is no YAML.
    """
    if len(text) > MAX_CHARACTERS:
        raise CompositionError(f"{name} is longer than {MAX_CHARACTERS:,} characters: give a shorter one.")
    opened: list[tuple[str | None, int]] = []  # collections not closed yet: anchor, and settings before it
    sizes: dict[str, int] = {}  # settings that an anchor stands for
    count = 0
    for event in yaml.parse(text, Loader=_Loader):
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((anchor, count))
            count += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor is not None:
                sizes[anchor] = count - before
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == around for around, _ in opened):
                raise CompositionError(f"the alias *{anchor} in {name} leads back to itself: write out what it is for.")
            count += sizes.get(str(anchor), 1)
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if anchor is not None:
                sizes[anchor] = 1
        if len(opened) > MAX_DEPTH:
            raise CompositionError(f"{name} is nested more than {MAX_DEPTH} deep: give a flatter one.")
        if count > MAX_SETTINGS:
            raise CompositionError(
                f"{name} holds more than {MAX_SETTINGS:,} settings, those its aliases stand for counted each time: "
                "give fewer."
            )
