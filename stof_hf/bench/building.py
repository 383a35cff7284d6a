"""What masks cost before the first attention call: time and memory of building them.

A mask is built, and from it the plan that the CUDA kernels stream, as a call with 12 heads of size
64 on an H200 has it. The peer is FlexAttention's BlockMask, made by its compiled builder from the
same mask function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ..attention.granules import Layout, granule_plan
from ..errors import StofError
from ..masks import Pattern, SparseMask, patterns
from . import timing
from .attention import environment, save, source_hash

__all__ = ["LENGTHS", "PATTERNS", "run", "table"]

LENGTHS = (128, 1024, 4096, 16384, 131072)
_PLAN = {"layout": Layout(2, False, 1.0), "copies": 12, "workers": 264, "together": 12}


def _documents(seq_len: int) -> Pattern:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(100, 1000, (seq_len // 100 + 1,), generator=draw)
    return patterns.Documents(torch.arange(len(lengths)).repeat_interleave(lengths)[:seq_len])


#: Closed-form patterns by name, made for a length.
PATTERNS: dict[str, Callable[[int], Pattern]] = {
    "causal": lambda s: patterns.Causal(),
    "sliding": lambda s: patterns.SlidingWindow(256, 0),
    "longformer": lambda s: patterns.Longformer(64, (*range(32), *range(s // 2, s // 2 + 32))),
    "bigbird": lambda s: patterns.BigBird(64, range(32), min(3, s // 64)),
    "dilated": lambda s: patterns.Dilated(128, 4),
    # The costliest to build: a tile for each 64 x 64 of a wide band, and a number for each element.
    "dilated_wide": lambda s: patterns.Dilated(512, 8),
    "random": lambda s: patterns.RandomBlocks(min(3, s // 64), fill=0.1),
    "chunked": lambda s: patterns.Chunked(1000),
    "prefix_lm": lambda s: patterns.PrefixLM(s // 3),
    "documents": _documents,
    "causal_documents": lambda s: _documents(s) & patterns.Causal(),
    "union": lambda s: (
        patterns.Causal() & (patterns.SlidingWindow(256, 0) | patterns.GlobalTokens((0, 1, 2)))
    ),
    "complement": lambda s: ~patterns.Longformer(64, (0,)),
}


def run(
    names: Iterable[str] = tuple(PATTERNS),
    seq_len: Iterable[int] = LENGTHS,
    *,
    device: torch.device,
    json_path: Path | None = None,
    progress: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Measure every pattern at every length and return the results, also kept in `json_path`.

    Raises StofError for an unknown name.
    """
    names = list(names)
    if unknown := set(names) - set(PATTERNS):
        known = ", ".join(PATTERNS)
        raise StofError(f"no pattern is called {unknown.pop()!r}; there are {known}")
    cells: list[dict[str, Any]] = []
    data = {"format": 1, **environment(device), "sources": source_hash(), "cells": cells}
    for length, name in product(seq_len, names):
        pattern = PATTERNS[name](length)
        record: dict[str, Any] = {"pattern": name, "seq_len": length}
        record["stof"] = _ours(pattern, length, device)
        if device.type == "cuda":
            record["flex"] = _flex(pattern.bind(length), length, device)
        cells.append(record)
        save(data, json_path)
        progress(record)
    return data


def _ours(pattern: Pattern, length: int, device: torch.device) -> dict[str, Any]:
    def build() -> SparseMask:
        return SparseMask.from_pattern(pattern, length, device=device)

    def plan() -> Any:
        mask.plans.clear()
        mask.plans.update(known)
        return granule_plan(mask, **_PLAN)

    memory = _memory(lambda: granule_plan(build(), **_PLAN), device)
    mask = build()
    known = dict(mask.plans)
    return {
        "mask_ms": round(timing.build_time_ms(build, device), 4),
        "plan_ms": round(timing.build_time_ms(plan, device), 4),
        **memory,
    }


def _flex(pattern: Pattern, length: int, device: torch.device) -> dict[str, Any]:
    from torch.nn.attention.flex_attention import create_block_mask

    def build() -> Any:
        return compiled(pattern, None, None, length, length, device=device)

    torch._dynamo.reset()
    compiled = torch.compile(create_block_mask, dynamic=False)
    try:
        build()
        return {"mask_ms": round(timing.build_time_ms(build, device), 4), **_memory(build, device)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


def _memory(build: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Peak of extra memory in MiB, of the host and of the GPU."""
    host = timing.host_peak_mb(build)
    out = {} if host is None else {"host_mb": round(host, 2)}
    if device.type == "cuda":
        out["device_mb"] = round(timing.peak_memory_mb(build), 2)
    return out


def table(data: dict[str, Any]) -> Table:
    """A row for each cell."""
    columns = {"mask ms": "mask_ms", "plan ms": "plan_ms", "host MiB": "host_mb"}
    columns |= {"GPU MiB": "device_mb"}
    peer = {"create_block_mask ms": "mask_ms", "its GPU MiB": "device_mb"}
    out = Table("pattern", "S", *columns, *peer, title=f"mask building, {data['device']}")
    for column in out.columns[1:]:
        column.justify = "right"
    for record in data["cells"]:
        flex = record.get("flex", {})
        values = [record["stof"].get(key) for key in columns.values()]
        values += ["[red]error[/]" if "error" in flex else flex.get(key) for key in peer.values()]
        shown = ["-" if x is None else f"{x:.3f}" if isinstance(x, float) else x for x in values]
        out.add_row(record["pattern"], str(record["seq_len"]), *shown)
    return out
