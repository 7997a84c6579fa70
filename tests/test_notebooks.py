"""Every notebook runs from its first cell to its last, in a fresh kernel and an empty folder."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


@pytest.mark.slow
@each_notebook
def test_runs_without_an_error(path, tmp_path):
    """nbclient raises what a cell raises."""
    notebook = nbformat.read(path, as_version=4)
    environment = os.environ | dict.fromkeys(THREADS, "1")
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=1800, startup_timeout=1800, resources=resources).execute(env=environment)


@each_notebook
def test_is_committed_with_its_results(path):
    """Run in order, all of it, no errors, small enough for a repository."""
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error"]
    assert path.stat().st_size < 1_500_000
