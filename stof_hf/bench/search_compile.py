"""What an exhaustive search runs, compiled before by several processes.

One process compiles slower than it measures: most of a compilation holds Python. Triton's cache on
disk is what processes share.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ..fusion.install import find
from ..tuning.inputs import run
from ..tuning.measure import measurer_for
from ..tuning.sample import capture
from .apart import told
from .search_peers import every
from .search_turns import times_kept
from .zoo import Cell, Problem

__all__ = ["compile_candidates"]


def compile_candidates(
    cell: Cell, device: torch.device, *, budget_s: float, times_path: Path | None = None,
    processes: int | None = None,
) -> None:  # fmt: skip
    """Run all candidates of a cell once, which compiles them, as many as there is time for.

    Args:
        budget_s: seconds, in which each process also loads the model.
        times_path: as `search_turns.compare` takes it; what was measured is not compiled.
        processes: one for each core but the caller's by default.
    """
    count = processes or max(1, len(os.sched_getaffinity(0)) - 1)
    deadline = time.time() + budget_s
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = [
            pool.submit(told, _compile, cell, device, slice(i, None, count), deadline, times_path)
            for i in range(count)
        ]
        for done in running:
            done.result()


def _compile(
    cell: Cell, device: torch.device, part: slice, deadline: float, times_path: Path | None
) -> None:
    problem = Problem.of(cell, device)
    model = problem.sparse_model()
    layers = [found for found in find(model) if found.reason is None]
    known: dict[str, Any] = {**times_kept(times_path, device)}
    with torch.no_grad():
        samples = capture(model, layers, *run(model, problem.inputs, "forward"))
        for sample in samples.values():
            new = {
                k: one for k, one in every(sample, measurer_for(device)).items() if k not in known
            }
            known |= new
            for one in list(new.values())[part]:
                if time.time() >= deadline:
                    return
                # What fails here fails again where it is measured.
                with contextlib.suppress(Exception):
                    sample.try_once(*one)
