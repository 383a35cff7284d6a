"""Runs a notebook for real and keeps it as it ran: python tests/run_notebook.py 02_tuning.

On a CPU, what `stof_hf.tune` measured is kept too, for test_notebooks.py to replay.
"""

import os
import sys
from pathlib import Path

import nbclient
import nbformat
import torch

ROOT = Path(__file__).parents[1]
_KEEP = """
import json, pathlib, torch
from stof_hf.tuning.measure import measurer_for

_times = measurer_for(torch.device("cpu")).times
if _times:
    pathlib.Path({path!r}).write_text(json.dumps(_times, indent=0) + "\\n")
"""


def recorded(name: str) -> Path:
    """Where the times of a notebook are kept."""
    return Path(__file__).with_name("recorded") / f"{name}.json"


def main(name: str) -> None:
    path = ROOT / "notebooks" / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    if not torch.cuda.is_available():
        notebook.cells.append(nbformat.v4.new_code_cell(_KEEP.format(path=str(recorded(name)))))
    client = nbclient.NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": ROOT}}, record_timing=False
    )
    # Progress bars that are not drawn as widgets are no news.
    client.execute(env=os.environ | {"PYTHONWARNINGS": "ignore:IProgress"})
    if not torch.cuda.is_available():
        notebook.cells.pop()
    nbformat.write(notebook, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
