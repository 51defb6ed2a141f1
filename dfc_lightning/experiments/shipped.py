"""Recipes by name: those of the working directory, and those that come with the package, in a wheel or in a clone."""

from __future__ import annotations

import difflib
from pathlib import Path

from dfc_lightning.errors import ControlError
from dfc_lightning.experiments.recipe import find_recipes

_PACKAGE = Path(__file__).resolve().parent.parent


def shipped(name: str) -> Path | None:
    """The folder ``name``, ``"recipes"`` or ``"results"``, of the package; None if it is not there.

    A wheel has it within the package, a clone beside it.
    """
    clone = _PACKAGE.parent
    places = [_PACKAGE / name, clone / name if (clone / "pyproject.toml").is_file() else None]
    return next((place for place in places if place is not None and place.is_dir()), None)


def recipes_folder() -> Path:
    """``recipes`` in the working directory if it holds any, or else that of the package."""
    here = Path("recipes")
    return here if find_recipes(here) else shipped("recipes") or here


def known_recipes() -> dict[str, Path]:
    """Every recipe's file by its name, e.g. ``"mnist/dfc_ss"``; the working directory's go before the package's."""
    folders = [folder for folder in (shipped("recipes"), Path("recipes")) if folder is not None]
    return {f"{path.parent.name}/{path.stem}": path for folder in folders for path in find_recipes(folder)}


def recipe_named(name: str) -> Path:
    """The file of a recipe.

    Raises:
        ControlError: there is no recipe of this name.
    """
    known = known_recipes()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, 3, 0.5)
    asked = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ControlError(f"--recipe={name}: there is no recipe of this name.{asked} dfc list names them all.")
