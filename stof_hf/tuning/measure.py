"""How long a candidate takes: CUDA graphs replayed, a clock on the CPU, or what was recorded."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch

from ..fusion.runners import TEMPLATES
from ..kernels.constant import constant_weights
from ..runtime.recorder import no_collection
from .compile_pool import CompilePool, noted

__all__ = ["Clock", "GraphReplay", "Measurer", "Recorded", "measurer_for", "replaying"]

Call = Callable[[], Any]
#: Makes calls of a candidate, which differ in the memory that their weights lie in.
Make = Callable[[], Sequence[Call]]
FAILED = float("inf")
#: For how long a GPU works before it is timed; and where a call takes longer, which then takes all
#: the power that the GPU may take: only after a while does the clock sink to what that allows.
_WARM_MS, _LONG_MS, _WARM_LONG_MS = 8, 0.05, 80
#: How long a graph takes that is replayed.
_GRAPH_MS = 0.5
#: Candidates that are compiled together, in threads and by other processes.
_THREADS, _QUEUED = 8, 64


class Measurer:
    """Times of candidates by their keys. What was measured once is never measured again.

    Attributes:
        times: key -> microseconds; infinite for what did not compile or computed something else.
        templates: whether Triton templates run here.
        shared_memory: bytes that a block may use.
    """

    templates = False
    shared_memory = 227 << 10

    def __init__(self) -> None:
        self.times: dict[str, float] = {}

    def time_us(self, key: str, make: Make) -> float:
        """The time of one call of a candidate in microseconds."""
        if key not in self.times:
            self.times[key] = self._time(key, make)
        return self.times[key]

    @property
    def at_once(self) -> int:
        """How many candidates are prepared together."""
        return _THREADS

    def compiling(self) -> AbstractContextManager[None]:
        """While somebody searches."""
        return contextlib.nullcontext()

    def prepare(self, candidates: Mapping[str, Call]) -> None:
        """Compile what is going to be measured, where that takes long: by default, nowhere."""

    def forget(self) -> None:
        """What was prepared is not measured after all."""

    def first(self, template: str, about: str) -> dict[str, int] | None:
        """The parameters of a template that were measured first, where only these are known.

        Args:
            about: the key of what it computes, behind the parameters.
        """
        return None

    def _time(self, key: str, make: Make) -> float:
        try:
            return self._measure(make())
        except Exception:  # kernels fail in many ways, and a search must survive each
            return FAILED

    def _measure(self, calls: Sequence[Call]) -> float:
        raise NotImplementedError


class Clock(Measurer):
    """Wall-clock time on the CPU: the least of at least five calls and 5 ms.

    The least, because whatever else runs on the machine can only make a call slower.
    """

    def _measure(self, calls: Sequence[Call]) -> float:
        calls[0]()
        times: list[float] = []
        while len(times) < 5 or sum(times) < 5e-3:
            begin = time.perf_counter()
            calls[len(times) % len(calls)]()
            times.append(time.perf_counter() - begin)
        return min(times) * 1e6


class GraphReplay(Measurer):
    """Device time of CUDA graphs: the median of their replays, without launch gaps."""

    templates = True

    def __init__(self, device: torch.device):
        super().__init__()
        properties = torch.cuda.get_device_properties(device)
        self.device = device
        self.shared_memory = properties.shared_memory_per_block_optin
        self._pool: CompilePool | None = None
        #: Of candidates that workers compile, or have.
        self._compiled: dict[str, list[Future[str | None]]] = {}

    @property
    def at_once(self) -> int:
        # Workers have enough to do while what is done is measured.
        return _QUEUED if self._pool is not None and self._pool.ready else super().at_once

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Other processes compile in here, once they are ready."""
        if self._pool is not None:
            yield
            return
        kernels = {f"stof_hf.fusion.templates.{t.module}" for t in TEMPLATES.values() if t.module}
        self._pool = CompilePool(sorted(kernels))
        try:
            yield
        finally:
            self._pool.close()
            self._pool = None
            self._compiled.clear()

    def prepare(self, candidates: Mapping[str, Call]) -> None:
        """Begin to compile what is not measured yet; without workers, compile it in threads."""
        new = {
            key: call for key, call in candidates.items()
            if key not in self.times and key not in self._compiled
        }  # fmt: skip
        if self._pool is not None and self._pool.ready:
            for key, call in new.items():
                with noted() as jobs:
                    self._compile(call)
                self._compiled[key] = [self._pool.submit(job) for job in jobs]
            return
        first, *rest = new.values() or [None]
        if not rest:
            return
        # What Triton and the driver set up once, they set up in this thread.
        self._compile(first)
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(self._compile, rest))
        torch.cuda.synchronize(self.device)

    def forget(self) -> None:
        if self._pool is not None:
            self._pool.forget()
        self._compiled.clear()

    def _time(self, key: str, make: Make) -> float:
        # What failed in a worker fails here again.
        wait(self._compiled.pop(key, ()))
        return super()._time(key, make)

    def _compile(self, call: Call) -> None:
        # What fails here fails again, and is noted, when it is measured.
        with contextlib.suppress(Exception), torch.no_grad(), torch.cuda.device(self.device):
            call()

    def _measure(self, calls: Sequence[Call]) -> float:
        with torch.cuda.device(self.device):
            return self._replay(calls)

    def _replay(self, calls: Sequence[Call]) -> float:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:
                call()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for call in calls:
                call()
            end.record()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        # About half a millisecond a replay. What was timed may be the host's time, which it takes
        # to launch the calls; then more of them fit.
        rounds, fit = 0, _rounds(begin.elapsed_time(end))
        while fit > 2 * rounds:
            rounds = fit
            graph = torch.cuda.CUDAGraph()
            with no_collection(), constant_weights(), torch.cuda.graph(graph):
                for _ in range(rounds):
                    for call in calls:
                        call()
            (once,) = self._times_ms(graph, 1)
            fit = _rounds(once / rounds)
        # The clock follows the power that the GPU takes, and compiling takes none.
        count = rounds * len(calls)
        warm_ms = _WARM_MS if once / count < _LONG_MS else _WARM_LONG_MS
        self._times_ms(graph, math.ceil(warm_ms / max(once, 1e-3)))
        return statistics.median(self._times_ms(graph, 9)) * 1000 / count

    @staticmethod
    def _times_ms(graph: torch.cuda.CUDAGraph, replays: int) -> list[float]:
        """Of each replay; they are queued, so that launches are not counted."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]


def _rounds(taken_ms: float) -> int:
    """How many calls of this length a graph is to hold."""
    return max(1, min(50, int(_GRAPH_MS / max(taken_ms, 1e-3))))


class Recorded(Measurer):
    """Times that were measured before: for tests, and for notebooks where there is no GPU.

    Args:
        times: key -> microseconds, as `TuneReport.to_json()["timings"]` has them, in the order in
            which they were measured. What is not among them counts as failed.
        templates, shared_memory: of the machine that they were measured on.
    """

    def __init__(
        self, times: Mapping[str, float | None], *, templates: bool = True,
        shared_memory: int = 227 << 10,
    ):  # fmt: skip
        super().__init__()
        self.recorded, self.templates, self.shared_memory = times, templates, shared_memory

    def first(self, template: str, about: str) -> dict[str, int] | None:
        # What a template takes untuned depends on the GPU, which is not here.
        for key in self.recorded:
            name, _, rest = key.partition("(")
            values, _, behind = rest.partition(") ")
            if name == template and behind == about and values:
                pairs = (pair.split("=") for pair in values.split(","))
                return {name: int(value) for name, value in pairs}
        return None

    def _time(self, key: str, make: Make) -> float:
        try:
            found = self.recorded[key]
        except KeyError:
            return FAILED
        return FAILED if found is None else found


_replayed: ContextVar[Measurer | None] = ContextVar("replayed", default=None)


@contextlib.contextmanager
def replaying(measurer: Measurer) -> Iterator[Measurer]:
    """Let `stof_hf.tune` take times from this measurer instead of measuring.

    >>> with replaying(Recorded({})):
    ...     type(measurer_for(torch.device("cpu"))).__name__
    'Recorded'
    """
    token = _replayed.set(measurer)
    try:
        yield measurer
    finally:
        _replayed.reset(token)


def measurer_for(device: torch.device) -> Measurer:
    """The measurer of a device, one for all searches of this process."""
    return _replayed.get() or _of_device(device)


@cache
def _of_device(device: torch.device) -> Measurer:
    return GraphReplay(device) if device.type == "cuda" else Clock()
