"""What `stof bench search` runs in new processes: a search, and a model's first forwards.

Nothing here imports the tuner before it is called, as a user's process does not either.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

import stof_hf

from .turns import measuring, turn
from .zoo import Cell, Problem

__all__ = ["first_forwards", "search"]


def search(
    cell: Cell, device: torch.device, *, budget_s: float, seeds: int, exhaustive_s: float = 0,
    times_path: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Tune a cell's model, for whose layers the search's peers look afterwards.

    Args:
        seeds: random searches.
        exhaustive_s, times_path: as `search_turns.compare` takes them.
    """
    problem = Problem.of(cell, device)
    model = problem.sparse_model()
    with measuring(), turn(device):
        begin = time.perf_counter()
        report = stof_hf.tune(model, problem.inputs, budget_s=budget_s, progress=False)
        seconds = time.perf_counter() - begin
        stof_hf.restore(model)
        from .records import searched
        from .search_turns import compare

        found = {**searched(report), "seconds": round(seconds, 2), "budget_s": budget_s}
        peers = compare(
            model, problem.inputs, report, seeds=seeds, exhaustive_s=exhaustive_s,
            times_path=times_path,
        )  # fmt: skip
    return {"search": found, **peers}


def first_forwards(cell: Cell, device: torch.device, *, tuned: bool) -> dict[str, float]:
    """Seconds that a model's first two forwards take, and `stof_hf.apply_tuned` before, if wanted.

    The first builds all that a graph of the model needs, the second finds it.
    """
    problem = Problem.of(cell, device)
    model = problem.sparse_model()
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    with measuring(), turn(device), torch.no_grad():
        wait()
        begin = time.perf_counter()
        if tuned:
            stof_hf.apply_tuned(model, strict=True)
        applied = time.perf_counter()
        for _ in range(2):
            model(**problem.inputs)
        wait()
        end = time.perf_counter()
    return {"apply_s": round(applied - begin, 3), "forwards_s": round(end - applied, 3)}
