"""Several processes prepare cells side by side; what they measure, they measure undisturbed.

Compiling a model with max-autotune keeps a core busy for minutes and the GPU for seconds. A time of
the GPU alone needs the GPU: processes take turns. A time that counts the host's part, too, needs
cores that nothing else heats or takes: it waits until no process prepares, and none begins to.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

__all__ = ["autotune_in_turn", "file_lock", "measuring", "preparing", "turn"]


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
    return FileLock(_file(name))


def _file(name: str) -> Path:
    return Path(tempfile.gettempdir()) / f"stof-bench-{name}.lock"


def preparing() -> AbstractContextManager[None]:
    """While any process of this machine is in here, none is in `measuring`."""
    return _together("preparing", "measuring")


def measuring() -> AbstractContextManager[None]:
    """While any process of this machine is in here, none is in `preparing`."""
    return _together("measuring", "preparing")


@contextlib.contextmanager
def _together(these: str, others: str) -> Iterator[None]:
    """With all that do the same, and with nobody who does the other."""
    with _file(these).open("w") as mine, _file(others).open("w") as theirs:
        # Closing the file that is held by all ends that.
        fcntl.flock(theirs, fcntl.LOCK_EX)
        fcntl.flock(mine, fcntl.LOCK_SH)
        fcntl.flock(theirs, fcntl.LOCK_UN)
        yield


@cache
def autotune_in_turn(device: torch.device) -> None:
    """Let torch.compile time candidates in turns of this process, and compile them outside."""
    from torch._inductor.runtime.benchmarking import benchmarker

    measure = benchmarker.benchmark_gpu

    @wraps(measure)
    def measure_in_turn(call: Any, *args: Any, **kwargs: Any) -> float:
        call()  # A kernel's first call may compile it.
        with turn(device):
            return measure(call, *args, **kwargs)

    benchmarker.benchmark_gpu = measure_in_turn
