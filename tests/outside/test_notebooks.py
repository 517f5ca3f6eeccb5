"""examples/notebooks run from the first cell to the last, each in a kernel of its own, and are short and clean."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbmake.nb_run import NotebookRun

from common import ROOT

FOLDER = ROOT / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SECONDS = 300
"""A cell may take so long on a busy machine."""


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_what_its_text_says_holds(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))  # nobody's profile or history
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    error = NotebookRun(path, SECONDS).execute().error
    assert error is None, error.trace


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_short_and_tells_what_to_look_at_before_each_cell(path: Path) -> None:
    cells = nbformat.read(path, 4).cells
    assert len(cells) < 15
    kinds = [cell.cell_type for cell in cells]
    assert all(kinds[place - 1] == "markdown" for place, kind in enumerate(kinds) if kind == "code")
    assert path.stat().st_size < 200_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_of_one_run_without_errors_or_warnings(path: Path) -> None:
    codes = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in codes] == list(range(1, len(codes) + 1))
    kinds = [output.get("name", output.output_type) for cell in codes for output in cell.outputs]
    assert set(kinds) == {"stdout", "display_data"}


def test_the_page_links_every_notebook() -> None:
    page = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    assert [path.name for path in NOTEBOOKS if f"(../examples/notebooks/{path.name})" not in page] == []
    assert len(NOTEBOOKS) == 3
