"""Triton kernels compiled by several processes.

Python's part of compiling is a fifth of it, and one process runs one thread of Python at a time:
threads compile seven kernels a second, however many cores there are. So other processes compile
for Triton's cache on disk, where this one finds what it launches. What a launch compiles, Triton
says to a hook, which keeps it from being compiled here and now.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from .compile_worker import READY, Job

__all__ = ["CompilePool", "noted"]

#: Fewer cores compile no faster in processes.
_LEAST_CORES = 4
_MOST_WORKERS = 32


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1


@contextlib.contextmanager
def noted() -> Iterator[list[Job]]:
    """What this thread launches in here, and would have to compile: a launch does nothing then."""
    from triton import knobs
    from triton.runtime import driver

    jobs: list[Job] = []
    before, here = knobs.runtime.jit_cache_hook, threading.get_ident()

    def note(*, fn: Any, compile: dict[str, Any], **rest: Any) -> bool:
        if threading.get_ident() != here:
            return bool(before and before(fn=fn, compile=compile, **rest))
        target = driver.active.get_current_target()
        options = json.loads(compile["specialization_data"])["options"]
        jobs.append(Job(
            fn.module, fn.name, compile["signature"], compile["constants"], compile["configs"][0],
            {name: _tuples(value) for name, value in options.items()},
            (target.backend, target.arch, target.warp_size),
        ))  # fmt: skip
        return True

    knobs.runtime.jit_cache_hook = note
    try:
        yield jobs
    finally:
        knobs.runtime.jit_cache_hook = before


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


class CompilePool:
    """Processes that compile; one for each core, or none where cores are few.

    It starts in the background, and until it is `ready`, or where it fails, launches compile by
    themselves.

    Args:
        modules: that kernels are in, imported once for all workers.
    """

    def __init__(self, modules: Sequence[str] = (), workers: int | None = None):
        count = workers or min(cores(), _MOST_WORKERS)
        self.ready = False
        self._pending: dict[int, Future[str | None]] = {}
        self._count = 0
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        if count < _LEAST_CORES and workers is None:
            return
        from triton import knobs

        # Workers are to find what this process imports, and to leave GPUs alone.
        environ = os.environ | {
            "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": knobs.cache.dir,
            "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen(
                [sys.executable, "-m", "stof_hf.tuning.compile_worker", str(count), *modules],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                env=environ, start_new_session=True,
            )  # fmt: skip
            threading.Thread(target=self._listen, daemon=True).start()

    def submit(self, job: Job) -> Future[str | None]:
        """Compile; the result says what failed, and nothing where nothing did."""
        future: Future[str | None] = Future()
        with self._lock:
            if not self.ready:
                future.set_result("there is no worker")
                return future
            self._count += 1
            number = self._count
            self._pending[number] = future
        self._send((number, job))
        return future

    def forget(self) -> None:
        """Do not begin with what was submitted and nobody began with."""
        if self.ready:
            self._send((0, None))

    def close(self) -> None:
        """End, whatever is being compiled."""
        if self._process is None:
            return
        self.ready = False
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def _send(self, what: Any) -> None:
        try:
            pickle.dump(what, self._process.stdin)
            self._process.stdin.flush()
        except (OSError, ValueError):
            self._give_up()

    def _listen(self) -> None:
        try:
            while True:
                told = pickle.load(self._process.stdout)
                if told == READY:
                    self.ready = True
                    continue
                number, error = told
                with self._lock:
                    future = self._pending.pop(number, None)
                if future is not None:
                    future.set_result(error)
        except (EOFError, OSError, ValueError, pickle.UnpicklingError):
            self._give_up()
        finally:
            self._process.stdout.close()

    def _give_up(self) -> None:
        with self._lock:
            self.ready = False
            pending, self._pending = self._pending, {}
        for future in pending.values():
            future.set_result("the workers ended")
