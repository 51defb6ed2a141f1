"""The notebooks under docs/ run, and are kept with the outputs of such a run."""

from __future__ import annotations

import pytest
from cases.paths import ROOT

NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_makes_what_it_is_kept_with(path, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as for all tests, in the kernel's process too
    nbformat = pytest.importorskip("nbformat", reason="needs the notebook extra")
    nbclient = pytest.importorskip("nbclient", reason="needs the notebook extra")
    pytest.importorskip("ipykernel", reason="needs the notebook extra")
    kept = nbformat.read(path, as_version=4)
    run = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        run, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert _kinds(kept) == _kinds(run) and any(_kinds(run))


def _kinds(notebook) -> list[list[str]]:
    """Of each code cell, what its outputs are; what is written to stderr, by other packages, aside."""
    cells = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    return [
        sorted(kind for each in outputs if each.get("name") != "stderr" for kind in each.get("data", ["stream"]))
        for outputs in cells
    ]
