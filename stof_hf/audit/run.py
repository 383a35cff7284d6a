"""Runs the audit: each model type in a worker process with a time limit, results as they come."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

TIME_LIMIT = 120.0  # seconds a model type


def model_types() -> list[str]:
    """All model types of the installed Transformers."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return sorted(CONFIG_MAPPING_NAMES)


def audit(
    types: list[str],
    *,
    json_path: Path | None = None,
    workers: int | None = None,
    time_limit: float = TIME_LIMIT,
    done: Callable[[str, dict[str, Any]], None] = lambda name, result: None,
) -> dict[str, Any]:
    """Compare "stof" with eager for model types, several at a time.

    Args:
        types: model types, as `model_types` lists them.
        json_path: results are kept here; those of the same versions that it already has are not
            computed again.
        workers: processes; one a core by default.
        time_limit: seconds that a model type may take.
        done: called with each type and its result as it comes.

    Returns:
        {"transformers": version, "torch": version, "types": {type: result of `audit_type`}}.
    """
    data = _load(json_path)
    todo = [name for name in types if name not in data["types"]]
    for name in types:
        if name in data["types"]:
            done(name, data["types"][name])
    pool = [_Worker() for _ in range(min(workers or os.cpu_count() or 1, len(todo)))]
    try:
        while todo or any(w.name for w in pool):
            for worker in pool:
                if worker.name is None and todo:
                    worker.start(todo.pop(0))
            wait([w.pipe for w in pool if w.name], timeout=1.0)
            for worker in pool:
                result = worker.result(time_limit) if worker.name else None
                if result is not None:
                    name, worker.name = worker.name, None
                    data["types"][name] = result
                    _save(json_path, data)
                    done(name, result)
    finally:
        for worker in pool:
            worker.stop()
    return {**data, "types": {n: r for n, r in data["types"].items() if n in set(types)}}


class _Worker:
    """A process that audits one type after another; it is replaced where it hangs or dies."""

    name: str | None = None

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other,), daemon=True)
        self.process.start()
        other.close()

    def start(self, name: str) -> None:
        self.name, self.since = name, time.monotonic()
        self.pipe.send(name)

    def result(self, time_limit: float) -> dict[str, Any] | None:
        """What came, what went wrong with the process, or None while it works."""
        seconds = time.monotonic() - self.since
        try:
            if self.pipe.poll():
                return {**self.pipe.recv(), "seconds": round(seconds, 1)}
        except EOFError:
            self._replace()
            return {"reason": f"the process died (exit status {self.status})"}
        if seconds > time_limit:
            self._replace()
            return {"reason": f"took more than {time_limit:.0f} seconds"}
        return None

    def _replace(self) -> None:
        self.stop()
        self.status = self.process.exitcode
        name, since, status = self.name, self.since, self.status
        self.__init__()
        self.name, self.since, self.status = name, since, status

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection) -> None:
    import resource
    import warnings

    import torch
    import transformers

    from .compare import audit_type

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    limit = 16 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    while True:
        try:
            name = pipe.recv()
        except EOFError:
            return
        try:
            result = audit_type(name)
        except Exception as error:
            result = {"reason": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        pipe.send(result)


def _load(path: Path | None) -> dict[str, Any]:
    import torch
    import transformers

    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    if path is not None and path.exists():
        data = json.loads(path.read_text())
        if {name: data.get(name) for name in versions} == versions:
            return data
    return {**versions, "types": {}}


def _save(path: Path | None, data: dict[str, Any]) -> None:
    if path is not None:
        partial = path.with_suffix(path.suffix + ".part")
        partial.write_text(json.dumps(data, indent=1))
        partial.replace(path)
