"""The notebooks run, and are committed as they ran."""

from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    committed = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in committed] == list(range(1, len(committed) + 1))
    shown = [output.get("data", {}) for cell in committed for output in cell.outputs]
    assert any("image/png" in data or "<img" in str(data.get("text/html")) for data in shown)

    where = {"metadata": {"path": ROOT}}
    nbclient.NotebookClient(notebook, timeout=240, resources=where).execute()
