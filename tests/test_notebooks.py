"""The notebooks run, and are committed as they ran; what `tune` measures is replayed."""

import os
from pathlib import Path

import nbclient
import nbformat
import pytest
from run_notebook import recorded

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
#: In front of a notebook whose times are recorded.
_REPLAY = """
import json, pathlib, torch
from stof_hf.tuning import cache, measure

cache.folder = lambda: pathlib.Path({folder!r})
_times = json.loads(pathlib.Path({recorded!r}).read_text())
_replaying = measure.replaying(measure.Recorded(_times, templates=False))
_replaying.__enter__()
# What else runs on the machine must not make threads wait for each other.
torch.set_num_threads(1)
"""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    committed = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in committed] == list(range(1, len(committed) + 1))
    shown = [output.get("data", {}) for cell in committed for output in cell.outputs]
    assert any("image/png" in data or "<img" in str(data.get("text/html")) for data in shown)

    environment = dict(os.environ)
    if (times := recorded(path.stem)).exists():
        setup = _REPLAY.format(folder=str(tmp_path / "tuning"), recorded=str(times))
        notebook.cells.insert(0, nbformat.v4.new_code_cell(setup))
        # They were recorded on a CPU.
        environment["CUDA_VISIBLE_DEVICES"] = ""
    where = {"metadata": {"path": ROOT}}
    nbclient.NotebookClient(notebook, timeout=240, resources=where).execute(env=environment)
