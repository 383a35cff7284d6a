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
    return _lock(str(torch.cuda.get_device_properties(device).uuid))


def file_lock(path: Path) -> AbstractContextManager[object]:
    """A file for this process alone, to be read, changed and written."""
    return _lock(hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:16])


@cache
def _lock(name: str) -> FileLock:
    return FileLock(Path(tempfile.gettempdir()) / f"stof-bench-{name}.lock")


@cache
def autotune_in_turn(device: torch.device) -> None:
    """Let torch.compile time candidates in turns of this process."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from torch._inductor.select_algorithm import AlgorithmSelectorCache

    choices = vars(AlgorithmSelectorCache)["benchmark_choices"].__func__
    AlgorithmSelectorCache.benchmark_choices = classmethod(_in_turn(choices, device))
    CachingAutotuner.bench = _in_turn(CachingAutotuner.bench, device)


def _in_turn(function: Any, device: torch.device) -> Any:
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with turn(device):
            return function(*args, **kwargs)

    return run
