"""Gradients of attention on identical masks: the backward alone, every contestant in one process.

The forward runs once; its backward is repeated with the graph retained, in a CUDA graph where that
can be captured. Gradients are compared with those of the fp64 reference: who differs gets no time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ..attention.reference import reference_attention
from . import timing
from .attention import describe, environment, grid, known_contestants, save, source_hash
from .contestants import CONTESTANTS, Cell, Contestant, Problem
from .masks import bench_mask

__all__ = ["MASKS", "NAMES", "cells", "run", "table"]

MASKS = ("longformer", "bigbird", "document", "causal")
NAMES = ("sdpa_mask", "sdpa_flash", "sdpa_cudnn", "flex_triton", "stof")
#: Largest norm of a gradient's error over the gradient's norm.
TOLERANCE = {"float16": 5e-3, "bfloat16": 3e-2, "float32": 2e-4}

Tensors = tuple[torch.Tensor, ...]


def cells(device: torch.device, masks: Iterable[str] = MASKS, **sizes: Any) -> list[Cell]:
    """The grid that `sizes` (as for `attention.grid`) name, else the usual one of the device."""
    masks = list(masks)
    if device.type != "cuda":
        return grid(masks, **({"batch": [1], "seq_len": [512], "dtype": "float32"} | sizes))
    lengths = {"seq_len": [1024, 4096]}
    if sizes:
        return grid(masks, **({"batch": [8]} | lengths | sizes))
    large = {"heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}
    return grid(masks, [1, 8], **lengths) + grid(masks, [2], **lengths, **large)


def run(
    cells: Iterable[Cell],
    *,
    contestants: Iterable[str] = NAMES,
    device: torch.device,
    json_path: Path | None = None,
    progress: Callable[[Cell, dict[str, Any]], None] = lambda cell, record: None,
) -> dict[str, Any]:
    """Measure `cells` and return the results, which are also kept in `json_path`.

    Of each contestant: time_us; rel_error, the largest of dq, dk and dv; peak_mb, its extra memory.

    Raises StofError for a contestant that does not exist.
    """
    chosen = known_contestants(contestants, NAMES)
    data: dict[str, Any] = {"format": 1, **environment(device), "sources": source_hash()}
    data["cells"] = []
    for cell in cells:
        results = _measure_cell(cell, [CONTESTANTS[name] for name in chosen], device)
        data["cells"].append({"cell": dataclasses.asdict(cell), "results": results})
        save(data, json_path)
        progress(cell, data["cells"][-1])
    return data


def _measure_cell(
    cell: Cell, chosen: list[Contestant], device: torch.device
) -> dict[str, dict[str, Any]]:
    problem = Problem.make(cell, bench_mask(cell.mask, cell.seq_len, device), device)
    leaves = [x.requires_grad_() for x in (problem.q, problem.k, problem.v)]
    draw = torch.Generator(device).manual_seed(1)
    shape = problem.q.shape
    upstream = torch.randn(shape, generator=draw, device=device).to(problem.q.dtype)
    exact = _reference(problem, upstream)
    results: dict[str, dict[str, Any]] = {}
    captured: dict[str, timing.CapturedCall] = {}
    for contestant in chosen:
        name = contestant.name
        if reason := contestant.unavailable(cell, device):
            results[name] = {"status": "unavailable", "error": reason}
            continue
        try:
            results[name] = _measure(contestant, problem, leaves, upstream, exact, captured)
        except Exception as error:
            results[name] = {"status": "error", "error": describe(error)}
            captured.pop(name, None)
    for name, time_us in zip(captured, timing.replay_times_us([*captured.values()]), strict=True):
        results[name]["time_us"] = round(time_us, 3)
    return results


def _reference(problem: Problem, upstream: torch.Tensor) -> Tensors:
    """dq, dk and dv in fp64, one key head at a time: fp64 scores of all would not fit."""
    cell, allowed = problem.cell, problem.mask.dense(problem.device)
    group = cell.heads // cell.kv_heads
    sums = [torch.empty(x.shape, dtype=torch.float64, device=x.device)
            for x in (problem.q, problem.k, problem.v)]  # fmt: skip
    for b in range(cell.batch):
        for h in range(cell.kv_heads):
            places = [(slice(b, b + 1), slice(h * n, (h + 1) * n)) for n in (group, 1, 1)]
            inputs = (problem.q, problem.k, problem.v)
            parts = [
                x.detach()[place].double().requires_grad_()
                for x, place in zip(inputs, places, strict=True)
            ]
            out, _ = reference_attention(*parts, allowed)
            grads = torch.autograd.grad(out, parts, upstream[places[0]].double())
            for total, place, grad in zip(sums, places, grads, strict=True):
                total[place] = grad
    return tuple(sums)


def _measure(
    contestant: Contestant, problem: Problem, leaves: list[torch.Tensor], upstream: torch.Tensor,
    exact: Tensors, captured: dict[str, timing.CapturedCall],
) -> dict[str, Any]:  # fmt: skip
    """All but the GPU time, which needs what is put into `captured`."""
    device, result = problem.device, {"status": "ok"}
    mask = contestant.build(problem) if contestant.build else None
    stream = torch.cuda.Stream() if device.type == "cuda" else None
    with contestant.prepare(problem, mask) as call, torch.cuda.stream(stream):
        # A backward runs on the stream of its forward.
        out = call()
        backward = partial(torch.autograd.grad, out, leaves, upstream, retain_graph=True)
        errors = [
            float((grad.double() - want).norm() / want.norm())
            for grad, want in zip(backward(), exact, strict=True)
        ]
        result["rel_error"] = max(errors)
        if not max(errors) <= TOLERANCE[problem.cell.dtype]:
            return {**result, "status": "wrong"}
        if stream is None:
            return {**result, "time_us": round(timing.wall_time_us(backward), 3)}
        torch.cuda.synchronize()
        result["peak_mb"] = round(timing.peak_memory_mb(backward), 2)
        try:
            captured[contestant.name] = timing.CapturedCall(backward, stream)
        except RuntimeError:
            torch.cuda.synchronize()
            result["time_us"] = round(timing.event_time_us(backward), 3)
    return result


def table(data: dict[str, Any]) -> Table:
    """Times in us, FlexAttention's over ours, and our error over that of SDPA with a mask."""
    made = Table(title=f"backward on {data['device']}, us")
    for name in ("cell", *NAMES, "vs flex", "error vs sdpa"):
        made.add_column(name, justify="left" if name == "cell" else "right")
    for record in data["cells"]:
        found = record["results"]

        def ratio(of: str, other: str, what: str, found: dict[str, Any] = found) -> str:
            a, b = (found.get(name, {}).get(what) for name in (of, other))
            return f"{a / b:.2f}" if a is not None and b else "-"

        times = (
            f"{r['time_us']:,.1f}" if "time_us" in r else r.get("status", "-")
            for r in (found.get(name, {}) for name in NAMES)
        )
        made.add_row(
            str(Cell(**record["cell"])), *times, ratio("flex_triton", "stof", "time_us"),
            ratio("stof", "sdpa_mask", "rel_error"),
        )  # fmt: skip
    return made
