"""Names in options: of recipes, and of our own classes where others have the same."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from dfc_lightning import data, models
from dfc_lightning.experiments.shipped import recipe_named

OURS = {name: f"{module.__name__}.{name}" for module in (models, data) for name in module.__all__}
"""Where our networks, models and data are, by their bare names."""

_PLACES = ("model", "data", "network", "class_path")
"""Options, by their last part, that take a class."""


def with_recipes(words: Sequence[str]) -> list[str]:
    """The words with ``--recipe NAME`` as the ``--config`` of its file, and our classes by their full names.

    Raises:
        ControlError: there is no such recipe.
    """
    found: list[str] = []
    for before, word in pairwise(["", *words]):
        option, sign, value = word.partition("=")
        if before == "--recipe":
            found.append(str(recipe_named(word)))
        elif word == "--recipe":
            found.append("--config")
        elif option == "--recipe" and sign:
            found.append(f"--config={recipe_named(value)}")
        elif _takes_a_class(option) and value in OURS:
            found.append(f"{option}={OURS[value]}")
        else:
            found.append(OURS[word] if _takes_a_class(before) and word in OURS else word)
    return found


def _takes_a_class(option: str) -> bool:
    return option.startswith("--") and "=" not in option and option.rpartition(".")[2].removeprefix("--") in _PLACES


def with_our_classes(tree: object) -> object:
    """Settings as read from a file, with our classes by their full names."""
    if isinstance(tree, list):
        return [with_our_classes(each) for each in tree]
    if not isinstance(tree, dict):
        return tree
    return {
        key: OURS[value] if key in _PLACES and isinstance(value, str) and value in OURS else with_our_classes(value)
        for key, value in tree.items()
    }
