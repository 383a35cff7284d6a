"""One decode step: a query for each head against a cache of keys and values.

Peers see the whole cache; ours also under the masks of a step, a causal view and a window, which
nobody else has kernels for at this price. Calls take turns, as in `attention.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..attention.op import attention
from ..attention.reference import reference_attention
from ..masks import SparseMask, patterns
from . import timing
from .attention import environment, save, source_hash
from .contestants import first_result

__all__ = ["BATCH", "CACHED", "PEERS", "run", "table"]

BATCH, CACHED = (1, 16), (1024, 8192, 32768)
_HEADS, _KV_HEADS, _DIM, _WINDOW = 32, 8, 128, 1024
#: Largest error of an element of a result, whose elements are about 0.05.
_TOLERANCE = 1e-2

Call = Callable[[], torch.Tensor]


@contextmanager
def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: SDPBackend) -> Iterator[Call]:
    with sdpa_kernel(backend):
        yield lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@contextmanager
def _fa4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterator[Call]:
    from flash_attn.cute.interface import flash_attn_func

    rows = [x.transpose(1, 2) for x in (q, k, v)]
    yield lambda: first_result(flash_attn_func(*rows)).transpose(1, 2)


#: Peers by name: context managers of a call.
PEERS: dict[str, Callable[..., Any]] = {
    "sdpa_flash": lambda *x: _sdpa(*x, SDPBackend.FLASH_ATTENTION),
    "sdpa_cudnn": lambda *x: _sdpa(*x, SDPBackend.CUDNN_ATTENTION),
    "fa4": _fa4,
}


def _ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Call]:
    cached, device = k.shape[2], k.device

    def step(pattern: patterns.Pattern | None) -> Call:
        view = None
        if pattern is not None:
            # Generation builds one mask, and each step gets a view of its row.
            mask = SparseMask.from_pattern(pattern, cached, device=device)
            row = torch.tensor([cached - 1], device=device)
            view = mask.rows(row, 1, cached)
        return lambda: attention(q, k, v, view)

    return {
        "stof": step(None),
        "stof causal": step(patterns.Causal()),
        f"stof window {_WINDOW}": step(patterns.SlidingWindow(_WINDOW - 1, 0)),
    }


def run(
    batch: Iterable[int] = BATCH,
    cached: Iterable[int] = CACHED,
    *,
    device: torch.device,
    json_path: Path | None = None,
    progress: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Time steps with a cache of so many keys, in bf16, 32 query and 8 key heads of size 128.

    A peer that is missing, raises, or computes something else has an "error" instead of "time_us".
    """
    cells: list[dict[str, Any]] = []
    data = {"format": 1, **environment(device), "sources": source_hash(), "cells": cells}
    with torch.no_grad():
        for b, length in product(batch, cached):
            cells.append(_measure(b, length, device))
            save(data, json_path)
            progress(cells[-1])
    return data


def _measure(batch: int, cached: int, device: torch.device) -> dict[str, Any]:
    draw = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(batch, heads, rows, _DIM, generator=draw, device=device, dtype=torch.bfloat16)
        for heads, rows in ((_HEADS, 1), (_KV_HEADS, cached), (_KV_HEADS, cached))
    )
    # One batch element at a time: the keys in fp64 take four times their memory.
    elements = zip(*(x.split(1) for x in (q, k, v)), strict=True)
    want = torch.cat([reference_attention(*x)[0] for x in elements])
    results: dict[str, dict[str, Any]] = {}
    captured: dict[str, timing.CapturedCall] = {}

    def prepare(name: str, call: Call, compared: bool) -> None:
        error = float((call().double() - want).abs().max()) if compared else 0.0
        if not error <= _TOLERANCE:
            results[name] = {"error": f"differs from the fp64 reference by {error:.2g}"}
        elif device.type == "cuda":
            captured[name] = timing.CapturedCall(call)
        else:
            results[name] = {"time_us": round(timing.wall_time_us(call), 3)}

    for name, call in _ours(q, k, v).items():
        prepare(name, call, "window" not in name)
    # What a GPU reads in the time in which it copies, reading and writing, the same bytes.
    both = torch.cat([k.flatten(), v.flatten()])
    there = torch.empty_like(both)
    prepare("copy", lambda: there.copy_(both), False)
    for name, peer in PEERS.items() if device.type == "cuda" else ():
        try:
            with ExitStack() as stack:
                prepare(name, stack.enter_context(peer(q, k, v)), True)
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    times = timing.replay_times_us([*captured.values()])
    for name, time_us in zip(captured, times, strict=True):
        results[name] = {"time_us": round(time_us, 3)}
    return {"batch": batch, "cached": cached, "bytes": both.nbytes, "results": results}


def table(data: dict[str, Any]) -> Table:
    """Times in us, those of the best peer over ours, and the share of a copy's bandwidth."""
    made = Table(title=f"one decode step on {data['device']}, us")
    names = list(data["cells"][0]["results"])
    for name in ("B", "cached", *names, "vs best peer", "of a copy's bandwidth"):
        made.add_column(name, justify="right")
    for cell in data["cells"]:
        times = {n: r["time_us"] for n, r in cell["results"].items() if "time_us" in r}
        peers = [times[name] for name in PEERS if name in times]
        # A copy moves every byte twice.
        share = times["copy"] / 2 / times["stof"] if {"copy", "stof"} <= set(times) else None
        made.add_row(
            str(cell["batch"]), str(cell["cached"]),
            *(f"{times[n]:.1f}" if n in times else "-" for n in names),
            f"{min(peers) / times['stof']:.2f}" if peers and "stof" in times else "-",
            "-" if share is None else f"{share:.0%}",
        )  # fmt: skip
    return made
