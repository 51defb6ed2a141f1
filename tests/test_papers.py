"""The papers of the project agree with each other, and what an index shows needs no clone."""

from __future__ import annotations

import re

import pytest
import yaml
from cases.paths import ROOT

import dfc_lightning

REPOSITORY = "https://host.example/owner/name"


def metadata(monkeypatch, repository):
    pytest.importorskip("hatchling")
    from hatchling.metadata.core import ProjectMetadata
    from hatchling.plugin.manager import PluginManager

    monkeypatch.setenv("DFC_REPOSITORY", repository)
    return ProjectMetadata(str(ROOT), PluginManager())


def test_there_is_one_version(monkeypatch):
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert metadata(monkeypatch, "").version == dfc_lightning.__version__ == cited["version"]
    assert cited["license"] == metadata(monkeypatch, "").core.license_expression


def test_a_release_links_by_addresses_and_anything_else_by_paths(monkeypatch):
    readme = (ROOT / "README.md").read_text()
    relative = re.findall(r"\]\((?!https?:|#)([^)]+)\)", readme)
    assert relative and all((ROOT / path.partition("#")[0]).exists() for path in relative)
    here, released = (metadata(monkeypatch, each).core for each in ("", REPOSITORY))
    assert here.readme == readme and list(here.urls) == ["Paper"]
    tag = f"v{dfc_lightning.__version__}"
    assert f"![Validation error on MNIST]({REPOSITORY}/raw/{tag}/docs/mnist.png)" in released.readme
    assert f"[docs/rules.md]({REPOSITORY}/blob/{tag}/docs/rules.md)" in released.readme
    assert not re.findall(r"\]\((?!https?:|#)", released.readme)
    assert released.readme.count("](") == readme.count("](")
    assert released.urls["Issues"] == f"{REPOSITORY}/issues"


def test_workflows_run_lanes_that_there_are_and_forms_ask_for_something():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    lanes = [each["lane"] for each in jobs["lane"]["strategy"]["matrix"]["include"]]
    told = (ROOT / ".ci/run").read_text()
    assert "lowest" in lanes and all(f"\n{lane}() {{" in told for lane in lanes)
    release = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]
    assert release["publish"]["needs"] == "build" and "DFC_REPOSITORY" in release["build"]["env"]
    forms = [path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
    assert len(forms) >= 2
    for form in forms:
        assert any(field.get("validations", {}).get("required") for field in yaml.safe_load(form.read_text())["body"])
