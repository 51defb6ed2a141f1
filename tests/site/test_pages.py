"""The documentation site: its pages, their links, what they name, and the code they print."""

from __future__ import annotations

import ast
import json
import re
import sys
import types
import unicodedata
from pathlib import Path

import pytest
import torch
import yaml
from cases.paths import ROOT

import dfc_lightning
from dfc_lightning.training.watch import _SENTENCES

DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")])


def text_of(page: Path) -> str:
    """Markdown without code."""
    text = page.read_text("utf-8")
    if page.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Of its headings, as the site and GitHub have them where these agree."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE):
        plain = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
        found.add(re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower()))
    return found


def links() -> list[tuple[Path, str]]:
    pages = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    found = [(page, link) for page in pages for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page))]
    return [(page, link) for page, link in found if not re.match(r"[a-z]+:", link)]


def in_nav(entry: object) -> list[str]:
    """Paths below an entry of the navigation."""
    if isinstance(entry, str):
        return [entry]
    children = entry.values() if isinstance(entry, dict) else entry
    return [path for child in children for path in in_nav(child)]  # type: ignore[attr-defined]


def test_every_page_is_in_the_navigation_once_and_every_entry_is_a_page():
    nav = in_nav(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"])
    assert sorted(nav) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


def test_every_relative_link_leads_to_a_file_and_to_a_heading_of_it():
    lost = []
    for page, link in links():
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(f"{page.relative_to(ROOT)}: {link}")
    assert len(links()) > 50 and not lost


def test_links_of_the_site_stay_within_it():
    assert not [(page, link) for page, link in links() if page in PAGES and not _within(page, link)]


def _within(page: Path, link: str) -> bool:
    return (page.parent / link.partition("#")[0]).resolve().is_relative_to(DOCS)


def test_the_reference_has_all_public_names():
    named = set(re.findall(r"^::: dfc_lightning\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE))
    assert named == set(dfc_lightning.__all__)


def test_there_is_a_choice_for_every_rule():
    rules = {name for name in dfc_lightning.__all__ if _is_rule(getattr(dfc_lightning, name))}
    text = (DOCS / "choosing.md").read_text()
    assert len(rules) > 15 and not {name for name in rules if f"`{name}" not in text}


def _is_rule(each: object) -> bool:
    base = dfc_lightning.LearningRule
    return isinstance(each, type) and issubclass(each, base) and each is not base


def test_the_sentences_of_troubleshooting_are_those_of_the_code():
    strings = "\n".join(map(_strings, (ROOT / "dfc_lightning").rglob("*.py")))
    text = (DOCS / "troubleshooting.md").read_text("utf-8")
    said = re.findall(r"^> \*(.*?)\*(?:<br>)?$", text, re.MULTILINE)
    said += [each for line in re.findall(r"^## (.*)$", text, re.MULTILINE) for each in re.findall(r'"(.*?)"', line)]
    assert len(said) > 20
    assert not [piece for each in said for piece in each.split("…") if piece.strip(" -") not in strings]


def _strings(file: Path) -> str:
    """All strings of a source file, those that stand side by side as one, with what is filled in left out."""
    found = []
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
            found.append("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(re.sub(r"{[^}]*}", "…", node.value))
    return "\n".join(found)


def test_every_sentence_of_the_watch_is_in_troubleshooting():
    text = (DOCS / "troubleshooting.md").read_text("utf-8")
    heads = [re.split(r"{[^}]*}", sentence)[0].split(":")[0].strip() for sentence in _SENTENCES.values()]
    named = {name: head for name, head in zip(_SENTENCES, heads) if head}
    assert len(named) > 6 and not {name for name, head in named.items() if head not in text}


@pytest.mark.parametrize("name", ["writing_a_rule", "your_module"])
def test_the_code_of_a_page_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    page = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, page)  # where dataclasses look for names
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / f"{name}.md").read_text(), re.DOTALL | re.MULTILINE)
    for block in blocks:
        exec(compile(block, f"{name}.md", "exec"), vars(page))
    if name == "writing_a_rule":  # and the rule learns: of ten classes, by chance nine in ten are wrong
        assert float(page.trainer.callback_metrics["val/error"]) < 30
