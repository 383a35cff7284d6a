"""The process that compiles for `compile_pool`: it imports what kernels need, and forks workers.

Run as `python -m stof_hf.tuning.compile_worker COUNT MODULE...`. It reads what is to be compiled
from standard input and writes what came of it to standard output, both pickled.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import pickle
import sys
import threading
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from functools import partial
from typing import Any, NamedTuple

__all__ = ["READY", "Job", "compile_job", "main"]

#: What is written when workers wait for jobs.
READY = "ready"


class Job(NamedTuple):
    """A Triton kernel as it is compiled for a launch.

    Args:
        module, name: where the kernel is.
        signature, constants, attributes: as `triton.compiler.ASTSource` takes them.
        options: of the backend.
        target: backend, architecture and size of a warp.
    """

    module: str
    name: str
    signature: dict[str, Any]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]
    target: tuple[str, Any, int]


def compile_job(job: Job) -> None:
    """Compile for Triton's cache on disk."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(job.module), job.name)
    source = ASTSource(kernel, job.signature, job.constants, job.attributes)
    kernel = triton.compile(source, target=GPUTarget(*job.target), options=job.options)
    if hasattr(driver, "make_launcher"):
        # Triton 3.6 has a C compiler make what launches, for each signature; later ones do not.
        # What fails here fails again where it is launched.
        with contextlib.suppress(Exception):
            driver.CudaLauncher(kernel.src, kernel.metadata)


def main(count: str, *modules: str) -> None:
    """Compile until there is nothing more to read.

    Args:
        count: of workers.
        modules: imported before workers are forked.
    """
    given, told = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # Nobody else reads or writes what this process and its parent say to each other.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    for module in ("triton.compiler", *modules):
        importlib.import_module(module)
    lock = threading.Lock()

    def tell(what: Any) -> None:
        with lock:
            pickle.dump(what, told)
            told.flush()

    def done(number: int, future: Future[None]) -> None:
        try:
            error = future.exception()
        except CancelledError as cancelled:
            error = cancelled
        tell((number, None if error is None else repr(error)))

    running: dict[int, Future[None]] = {}
    with ProcessPoolExecutor(int(count), mp_context=multiprocessing.get_context("fork")) as pool:
        pool.submit(int).result()
        tell(READY)
        try:
            while True:
                number, job = pickle.load(given)
                if job is None:
                    for future in running.values():
                        future.cancel()
                    running.clear()
                    continue
                running[number] = pool.submit(compile_job, job)
                running[number].add_done_callback(partial(done, number))
        except EOFError:
            pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
