"""What the README, the docs and the recipes name is there."""

from __future__ import annotations

import pkgutil
import re

import pytest
from cases.paths import RECIPES, ROOT

PROSE = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WRITTEN = {str(path.relative_to(ROOT)): path.read_text() for path in [*PROSE, *sorted(RECIPES.rglob("*.yaml"))]}


def named(text: str) -> set[str]:
    """Dotted paths into the package, those of import statements included."""
    found = set(re.findall(r"\bdfc_lightning(?:\.\w+)+", text))
    for package, names in re.findall(r"from (dfc_lightning[.\w]*) import (\([^)]*\)|[\w, ]+)", text):
        found |= {f"{package}.{name}" for name in re.findall(r"\w+", names)}
    return found


def test_there_are_names_to_look_for():
    assert {"dfc_lightning.DFCStrategy", "dfc_lightning.data.Digits"} <= named(WRITTEN["README.md"])
    assert "dfc_lightning.DFC" in set().union(*(named(text) for path, text in WRITTEN.items() if "recipes" in path))


@pytest.mark.parametrize("path", [path for path, text in WRITTEN.items() if named(text)])
def test_every_class_path_leads_somewhere(path):
    for name in sorted(named(WRITTEN[path])):
        pkgutil.resolve_name(name)


@pytest.mark.parametrize("path", [str(each.relative_to(ROOT)) for each in PROSE])
def test_every_link_to_a_file_leads_somewhere(path):
    here = (ROOT / path).parent
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", WRITTEN[path])
    assert [link for link in links if not (here / link).exists()] == []
