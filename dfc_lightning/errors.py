"""Errors that name the argument, its value and the remedy."""

from __future__ import annotations

from typing import Any


class ControlError(RuntimeError):
    """The module cannot be controlled as it is; the message names the cause and the remedy."""


def require(condition: bool, argument: str, value: Any, remedy: str) -> None:
    """Raise a ``ValueError`` that names the argument, the value and the remedy, unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{argument}={value!r} is not possible: {remedy}.")
