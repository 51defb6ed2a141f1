"""Recipes made of others: a file's ``base`` names what it is laid over.

    base: [_column.yaml, ../_shared/dfc_ss.yaml]

Paths are relative to the file that names them. Later bases are laid over earlier ones, the file itself over all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dfc_lightning.experiments.reading import CompositionError, read_settings

BASE = "base"
MAX_BASES = 64
"""Files that a recipe is made of, each counted as often as it is named."""


def compose(path: str | Path) -> dict[str, Any]:
    """The settings of the recipe at ``path``, laid over those of its bases.

    Raises:
        CompositionError: a file is no recipe; a base is missing or leads back to itself; or there are too many.
    """
    return _Composition(Path(path).name).read(Path(path), ())


def composed(tree: Mapping[str, Any], folder: str | Path, name: str = "the config") -> dict[str, Any]:
    """``tree`` laid over its bases, if it names any.

    Args:
        tree: settings, as read from a file in ``folder``.
        folder: what paths of bases are relative to.
        name: what to call it in errors.

    Raises:
        CompositionError: a base is no recipe, is missing or leads back to itself; or there are too many.
    """
    within = ((Path(folder) / name).resolve(),)
    return _Composition(name).laid_over_bases(tree, Path(folder), name, within)


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


class _Composition:
    """Reads a recipe with its bases, which bases in common could double at every level.

    Args:
        name: the recipe, as errors call it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.read_so_far = 0

    def read(self, path: Path, within: tuple[Path, ...]) -> dict[str, Any]:
        self.read_so_far += 1
        if self.read_so_far > MAX_BASES:
            raise CompositionError(
                f"{self.name} is made of more than {MAX_BASES} files, those named more than once by {BASE} counted "
                "each time: name fewer."
            )
        tree = read_settings(path)
        if not isinstance(tree, Mapping):
            raise CompositionError(f"{path} holds no settings: give a mapping of keys to values.")
        return self.laid_over_bases(tree, path.parent, path.name, (*within, path.resolve()))

    def laid_over_bases(
        self, tree: Mapping[str, Any], folder: Path, name: str, within: tuple[Path, ...]
    ) -> dict[str, Any]:
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
                raise CompositionError(
                    f"{BASE}={base!r} in {name} leads back to itself ({chain}): remove one of these."
                )
            below = merge(below, self.read(path, within))
        return merge(below, top)
