"""Recipes made of others: a file's ``base`` names what it is laid over.

    base: [_column.yaml, ../_shared/dfc_ss.yaml]

Paths are relative to the file that names them. Later bases are laid over earlier ones, the file itself over all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

BASE = "base"


class CompositionError(ValueError):
    """A recipe whose bases cannot be had."""


def compose(path: str | Path) -> dict[str, Any]:
    """The settings of the recipe at ``path``, laid over those of its bases.

    Raises:
        CompositionError: a base is missing, is no mapping, or leads back to itself.
    """
    return _read(Path(path), ())


def composed(tree: Mapping[str, Any], folder: str | Path, name: str = "the config") -> dict[str, Any]:
    """``tree`` laid over its bases, if it names any.

    Args:
        tree: settings, as read from a file in ``folder``.
        folder: what paths of bases are relative to.
        name: what to call it in errors.

    Raises:
        CompositionError: a base is missing, is no mapping, or leads back to itself.
    """
    return _laid_over_bases(tree, Path(folder), name, ((Path(folder) / name).resolve(),))


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """``top`` laid over ``base``: mappings are merged, all else is replaced, lists too.

    A class given by another ``class_path`` than the base's replaces it with its arguments.
    """
    merged = dict(base)
    for key, value in top.items():
        below = base.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping) and not _other_class(below, value):
            merged[key] = merge(below, value)
        else:
            merged[key] = value
    return merged


def _other_class(base: Mapping[str, Any], top: Mapping[str, Any]) -> bool:
    return "class_path" in top and top["class_path"] != base.get("class_path")


def _read(path: Path, within: tuple[Path, ...]) -> dict[str, Any]:
    tree = yaml.safe_load(path.read_text())
    if not isinstance(tree, Mapping):
        raise CompositionError(f"{path} holds no settings: give a mapping of keys to values.")
    return _laid_over_bases(tree, path.parent, path.name, (*within, path.resolve()))


def _laid_over_bases(tree: Mapping[str, Any], folder: Path, name: str, within: tuple[Path, ...]) -> dict[str, Any]:
    top = {key: value for key, value in tree.items() if key != BASE}
    bases = tree.get(BASE, [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise CompositionError(f"{BASE}={bases!r} in {name}: give the path of a recipe, or a list of paths.")
    below: dict[str, Any] = {}
    for base in bases:
        path = folder / base
        if not path.is_file():
            raise CompositionError(
                f"{BASE}={base!r} in {name}: there is no such file. Give its path relative to that of {name}."
            )
        if path.resolve() in within:
            chain = " -> ".join(p.name for p in (*within, path))
            raise CompositionError(f"{BASE}={base!r} in {name} leads back to itself ({chain}): remove one of these.")
        below = merge(below, _read(path, within))
    return merge(below, top)
