"""Several processes prepare cells side by side, and one at a time has the GPU to measure.

Compiling a model with max-autotune keeps a core busy for a minute and the GPU for a few seconds.
What other processes run once meanwhile, a first call, may still fall into a turn: hence medians.
"""

from __future__ import annotations

import hashlib
import tempfile
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

__all__ = ["autotune_in_turn", "file_lock", "turn"]


def turn(device: torch.device) -> AbstractContextManager[object]:
    """The GPU for this process alone, as far as others ask for turns; may be nested."""
    if device.type != "cuda":
        return nullcontext()
    return _held(str(torch.cuda.get_device_properties(device).uuid))


def file_lock(path: Path) -> AbstractContextManager[object]:
    """A file for this process alone, to be read, changed and written."""
    return _held(hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:16])


def _held(name: str) -> AbstractContextManager[object]:
    # Who polls seldom waits long for somebody who gives the lock back only to take it again.
    return _lock(name).acquire(poll_interval=0.002)


@cache
def _lock(name: str) -> FileLock:
    return FileLock(Path(tempfile.gettempdir()) / f"stof-bench-{name}.lock")


@cache
def autotune_in_turn(device: torch.device) -> None:
    """Let torch.compile time candidates in turns of this process, and compile them outside."""
    from torch._inductor.runtime.benchmarking import benchmarker

    measure = benchmarker.benchmark_gpu

    @wraps(measure)
    def measure_in_turn(*args: Any, **kwargs: Any) -> float:
        with turn(device):
            return measure(*args, **kwargs)

    benchmarker.benchmark_gpu = measure_in_turn
