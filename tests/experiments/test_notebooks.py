"""The notebooks run from top to bottom, show their figures, and are stored as they ran."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from few import few
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MAX_BYTES = 300_000  # bytes; figures are small
SHARED = Path(os.environ.get("SENSITIVITY_SHARED", FOLDER.parent.parent / "shared")) / "data" / "published"


def executed(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(FOLDER)}}).execute()
    return notebook


def pictures(notebook: nbformat.NotebookNode) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize(
    "name", few([path.stem for path in NOTEBOOKS], ["01_a_plan_for_a_budget", "02_published_tables"])
)
def test_it_runs_and_shows_its_figures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    shown = pictures(executed(FOLDER / f"{name}.ipynb"))
    assert shown >= 2 if SHARED.exists() or "published" not in name else shown == 0


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_it_is_stored_with_its_figures_and_ends_in_a_decision(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert pictures(notebook) >= 2
    assert path.stat().st_size < MAX_BYTES
    assert "**What you can decide now.**" in notebook.cells[-1].source


@pytest.mark.slow
def test_without_the_table_it_says_what_it_would_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("SENSITIVITY_SHARED", str(tmp_path))
    notebook = executed(FOLDER / "02_published_tables.ipynb")
    assert pictures(notebook) == 0
    assert "is not here. With it this notebook shows" in str(notebook.cells[1].outputs)
