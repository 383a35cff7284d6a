"""Time and memory of one call."""

from __future__ import annotations

import gc
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "CapturedCall", "build_time_ms", "event_time_us", "finished_times_ms", "host_peak_mb",
    "host_time_us", "peak_memory_mb", "replay_times_us", "turns_ms", "wall_time_us",
]  # fmt: skip

Call = Callable[[], Any]

#: A call that takes longer is taken for one that keeps the whole GPU busy.
_FILLS_MS = 0.2
#: Seconds that a call's turn takes at least, and its turns.
_TURN_S, _TURNS = 0.05, 6


class CapturedCall:
    """A CUDA graph of a call, repeated where it is short. What it returns is thrown away.

    Args:
        stream: on which it is captured: of a backward that of its forward, which it runs on.
    """

    def __init__(self, call: Call, stream: torch.cuda.Stream | None = None):
        side = stream or torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.call = call  # The graph knows the addresses of its tensors only.
        self.once_ms = begin.elapsed_time(end)
        self.calls = 25 if self.once_ms < 0.4 else 5 if self.once_ms < 4 else 1
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            for _ in range(self.calls):
                call()

    def times_ms(self, replays: int) -> list[float]:
        """Of each replay; they are queued, so that no launch gap is counted.

        As many more run before as take 30 ms, or 120 ms of a call that fills the GPU: after about
        100 ms at the most power that it may take, its clock sinks.
        """
        warm_up_ms = 30 if self.once_ms < _FILLS_MS else 120
        for _ in range(max(1, math.ceil(warm_up_ms / (self.calls * self.once_ms)))):
            self.graph.replay()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
        events[0].record()
        for event in events[1:]:
            self.graph.replay()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]


def replay_times_us(captured: Sequence[CapturedCall]) -> list[float]:
    """Device time of one of each of the calls in microseconds: the median of 20 replays, 8 of calls
    that take 4 ms or more.

    The calls take two turns, each time behind another one: what ran before, and how much power it
    took, favours none.
    """
    times: dict[int, list[float]] = {i: [] for i in range(len(captured))}
    back, half = [*reversed(times)], len(captured) // 2
    for i in (*times, *back[half:], *back[:half]):
        times[i] += captured[i].times_ms(10 if captured[i].once_ms < 4 else 4)
    return [statistics.median(times[i]) * 1000 / one.calls for i, one in enumerate(captured)]


def event_time_us(call: Call) -> float:
    """Device time of a call that no graph can hold, gaps between its kernels included: the median
    of 20, behind as many others."""
    for _ in range(20):
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(21)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    pairs = zip(events, events[1:], strict=False)
    return statistics.median(a.elapsed_time(b) for a, b in pairs) * 1000


def wall_time_us(call: Call) -> float:
    """Time of one call on the CPU in microseconds: the median of at least 5 calls and 0.2 s."""
    call()
    times: list[float] = []
    while len(times) < 5 or sum(times) < 0.2:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e6


def host_time_us(call: Call) -> float:
    """Host time of an asynchronous CUDA call in microseconds: the least of five runs of 20."""
    runs = []
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(20):
            call()
        runs.append((time.perf_counter() - begin) / 20)
    torch.cuda.synchronize()
    return min(runs) * 1e6


def build_time_ms(build: Call, device: torch.device) -> float:
    """Wall-clock time of building a mask in milliseconds, on a GPU until it is there.

    The median of those after a first that fit into 50 ms, of three at least.
    """
    return statistics.median(finished_times_ms(build, device, 50))


def finished_times_ms(call: Call, device: torch.device, total_ms: float) -> list[float]:
    """Wall-clock times of calls in milliseconds, each until the GPU has done it.

    Of those after a first that fit into `total_ms`, of three at least.
    """
    times: list[float] = []
    while len(times) < 4 or sum(times[1:]) < total_ms:
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    return times[1:]


def peak_memory_mb(call: Call) -> float:
    """Most extra CUDA memory that one call holds, its output included, in MiB."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def host_peak_mb(call: Call) -> float | None:
    """Most extra memory of this process during one call, in MiB; None where Linux does not tell.

    Memory that an earlier call has left with the allocator is not counted again.
    """

    def status(name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
        return int(found[1]) if found else 0

    gc.collect()
    try:
        # Sets the peak back to what is used now.
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        call()
        return (status("VmHWM") - before) / 2**10
    except OSError:
        return None


def turns_ms(calls: Mapping[str, Call], device: torch.device) -> dict[str, float]:
    """Milliseconds of calls, host time included: medians over turns, every other one in reverse
    order."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def timed(call: Call, count: int) -> float:
        wait()
        begin = time.perf_counter()
        for _ in range(count):
            call()
        wait()
        return (time.perf_counter() - begin) / count

    # What a contestant's first call after another's has to set up is not to count.
    counts = {
        name: max(1, min(200, int(_TURN_S / min(timed(call, 1) for _ in range(4)))))
        for name, call in calls.items()
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(_TURNS):
        for name in [*calls] if i % 2 == 0 else [*reversed(calls)]:
            # The first call after another's finds caches and clocks as that left them.
            timed(calls[name], 1)
            times[name].append(timed(calls[name], counts[name]))
    return {name: statistics.median(taken) * 1e3 for name, taken in times.items()}
