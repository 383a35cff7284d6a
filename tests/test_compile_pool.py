"""Processes that compile for the search: what launches ask for, and what becomes of it."""

import contextlib
import threading
from concurrent.futures import Future

import pytest
import torch
from compiling import without_a_gpu

from stof_hf.tuning import measure
from stof_hf.tuning.compile_pool import CompilePool
from stof_hf.tuning.measure import Clock, GraphReplay

pytest.importorskip("triton")


def test_a_pool_compiles_what_launches_ask_for(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    *_, told = without_a_gpu("compile_in_pool.py", str(tmp_path))
    assert told["early"] == "there is no worker"
    assert told["ready"] and told["jobs"] == told["kernels"] == 2
    *right, wrong = told["errors"]
    assert right == [None, None] and "no_such_kernel" in wrong
    assert told["ended"] == 40 and told["after"] == "there is no worker"


def test_few_cores_have_no_pool(monkeypatch):
    monkeypatch.setattr("stof_hf.tuning.compile_pool.cores", lambda: 3)
    pool = CompilePool()
    assert not pool.ready and pool.submit(None).result() == "there is no worker"
    pool.forget()
    pool.close()


class _Pool:
    """A pool whose jobs are done when the test says so."""

    ready = True

    def __init__(self):
        self.jobs, self.forgot = [], 0

    def submit(self, job):
        self.jobs.append((job, Future()))
        return self.jobs[-1][1]

    def forget(self):
        self.forgot += 1


@pytest.fixture
def measurer(monkeypatch):
    """Of a GPU, whose calls note a job each where they are prepared."""

    @contextlib.contextmanager
    def noted():
        noting.append([])
        yield noting[-1]

    noting = []
    made = GraphReplay.__new__(GraphReplay)
    super(GraphReplay, made).__init__()
    made.device, made._pool, made._compiled = torch.device("cpu"), _Pool(), {}
    monkeypatch.setattr(measure, "noted", noted)
    monkeypatch.setattr(GraphReplay, "_compile", lambda self, call: noting[-1].append(call))
    monkeypatch.setattr(GraphReplay, "_measure", lambda self, calls: float(len(calls)))
    return made


def test_what_workers_compile_is_waited_for(measurer):
    measurer.times["known"] = 1.0
    measurer.prepare({"known": "a", "one": "b", "two": "c"})
    measurer.prepare({"one": "b"})
    assert [job for job, _ in measurer._pool.jobs] == ["b", "c"]
    threading.Timer(0.2, measurer._pool.jobs[0][1].set_result, [None]).start()
    assert measurer.time_us("one", lambda: ["call"] * 3) == 3.0
    assert measurer._pool.jobs[0][1].done()
    assert measurer.at_once > Clock().at_once
    measurer.forget()
    # Nobody waits for the second any more.
    assert measurer.time_us("two", lambda: ["call"]) == 1.0 and measurer._pool.forgot == 1
