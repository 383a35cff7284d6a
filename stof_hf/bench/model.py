"""Whole models: a forward as Transformers, torch.compile, Liger-Kernel and this package compute it.

Contestants of a cell take turns in one process. Every call is timed as a user calls it, host time
included: that is what decides small shapes. Several processes may fill one table.
"""

from __future__ import annotations

import concurrent.futures
import gc
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from ..tuning import environment as tuned
from .apart import told
from .attention import FORMAT, describe, known_contestants
from .ceiling import ceiling_ms, products
from .records import keep, kept, model_environment, records, searched
from .timing import host_time_us, turns_ms
from .turns import autotune_in_turn, measuring, preparing, turn
from .zoo import ZOO, Cell, Problem

__all__ = ["CONTESTANTS", "Contestant", "measure", "run", "run_apart", "table"]

Call = Callable[[], torch.Tensor]
#: An output may be so much farther from fp32 than the plain model in half precision is.
_WORSE = 1.25
#: Calls that take longer keep the GPU busy: what the host takes is then not measured.
_HOST_MS = 5


@dataclass(frozen=True)
class Contestant:
    """How a model is computed.

    Args:
        attention: Transformers' implementation.
        mode: of torch.compile.
        ours: what this package does besides: "unpad", "tune", "graphs".
        only: models that it is for.
    """

    attention: str
    mode: str | None = None
    ours: tuple[str, ...] = ()
    liger: bool = False
    only: tuple[str, ...] = tuple(ZOO)

    @property
    def is_ours(self) -> bool:
        """Whether this package does something."""
        return self.attention == "stof" or bool(self.ours)

    def takes(self, model: str) -> bool:
        """Whether it computes this model."""
        flex = self.attention != "flex_attention" or ZOO[model].cls._supports_flex_attn
        return model in self.only and flex


CONTESTANTS = {
    "eager": Contestant("eager"),
    "sdpa": Contestant("sdpa"),
    "liger": Contestant("sdpa", liger=True, only=("llama_base",)),
    # Of ours, untuned; then what each part does by itself; then all.
    "stof": Contestant("stof"),
    "graphs": Contestant("sdpa", ours=("graphs",)),
    "attention": Contestant("stof", ours=("graphs",)),
    "fusion": Contestant("sdpa", ours=("tune", "graphs")),
    "tuned": Contestant("stof", ours=("tune", "graphs")),
    # Last, because what their graphs hold comes and goes while others' memory is counted.
    **{
        f"{mode}_{attention}": Contestant(
            f"{attention}_attention" if attention == "flex" else attention, mode,
            only=tuple(n for n, entry in ZOO.items() if entry.masked or attention == "sdpa"),
        )
        for mode in ("default", "reduce-overhead", "max-autotune")
        for attention in ("sdpa", "flex")
    },
}  # fmt: skip
OURS = tuple(name for name, contestant in CONTESTANTS.items() if contestant.is_ours)


def run(
    chosen: Iterable[Cell], *, contestants: Iterable[str] = tuple(CONTESTANTS),
    device: torch.device, budget_s: float = 60, prepare_s: float = math.inf,
    json_path: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure cells, and return the results, which are also kept in `json_path`.

    Contestants that the file already holds are skipped, ours only while their sources are the same.
    Beside those that are missing "sdpa" is measured again, and beside ours also the two peers that
    were fastest: what is compared ran in turns in one process.

    Args:
        budget_s: seconds for `stof_hf.tune` in a cell.
        prepare_s: seconds after which no other contestant of a cell is prepared: the next run
            finds it missing.
    """
    names = known_contestants(contestants, CONTESTANTS)
    sources = tuned.environment(device).sources
    data = {"format": FORMAT, **model_environment(device), "cells": []}
    known = records(kept(json_path, data))
    for cell in chosen:
        record = known.get(cell) or {"cell": asdict(cell), "results": {}}
        results = record["results"]
        missing = [n for n in names if CONTESTANTS[n].takes(cell.model)]
        missing = [
            n for n in missing
            if n not in results or (n in OURS and results[n].get("sources") != sources)
        ]  # fmt: skip
        if missing:
            beside = {"sdpa", *(_fastest(results, 2) if set(missing) & set(OURS) else ())}
            here = {n: c for n, c in CONTESTANTS.items() if n in beside or n in missing}
            results |= measure(Problem.of(cell, device), here, budget_s, prepare_s, sources)
        if "ceiling_ms" not in record:
            problem = Problem.of(cell, device)
            with turn(device):
                record["ceiling_ms"] = round(_ceiling(problem), 4)
        data = keep(record, json_path, data)
    return data


def _fastest(results: dict[str, Any], count: int) -> list[str]:
    """The peers with the least time."""
    times = {n: r["time_ms"] for n, r in results.items() if n not in OURS and "time_ms" in r}
    return sorted(times, key=times.__getitem__)[:count]


def _ceiling(problem: Problem) -> float:
    model = problem.model("sdpa")
    with torch.no_grad():
        sizes = products(model, lambda: model(**problem.inputs, **problem.masks("bool")))
        return ceiling_ms(sizes, problem.dtype, problem.device)


def run_apart(
    chosen: Iterable[Cell], device: torch.device,
    progress: Callable[[Cell, dict[str, Any]], None], *, jobs: int = 1, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """As `run`, each cell in a process of its own.

    Args:
        progress: is called with each cell that is done, and its record.
        jobs: cells that are prepared side by side; when all of them are, they are measured.
    """
    spawn = multiprocessing.get_context("spawn")
    order, data = list(chosen), {"cells": []}
    for begin in range(0, len(order), jobs):
        batch = order[begin : begin + jobs]
        with concurrent.futures.ProcessPoolExecutor(
            len(batch), mp_context=spawn, max_tasks_per_child=1
        ) as pool:
            running = {
                pool.submit(told, run, [cell], device=device, **options): cell for cell in batch
            }
            for done in concurrent.futures.as_completed(running):
                part, cell = done.result(), running[done]
                record = records(part)[cell]
                data = {**part, "cells": [*data["cells"], record]}
                progress(cell, record)
    data["cells"].sort(key=lambda record: order.index(Cell(**record["cell"])))
    return data


def measure(
    problem: Problem, contestants: Mapping[str, Contestant], budget_s: float, prepare_s: float,
    sources: str,
) -> dict[str, Any]:  # fmt: skip
    """What contestants take for a problem, and how exact they are, by name; see `run`.

    Args:
        sources: of this package, kept with what is ours.
    """
    device = problem.device
    torch._dynamo.config.recompile_limit = 64
    if device.type == "cuda":
        autotune_in_turn(device)
    calls: dict[str, Call] = {}
    results: dict[str, Any] = {}
    start = time.monotonic()
    with torch.no_grad():
        with preparing():
            with turn(device):
                exact = _reference(problem, torch.float32)
                plain = _distance(problem, _reference(problem, problem.dtype), exact)
            for name, contestant in contestants.items():
                begin = time.monotonic()
                if begin - start > prepare_s:
                    break
                before = _allocated(device)
                results[name] = result = {}
                try:
                    call = _prepare(contestant, problem, budget_s, result)
                    call()
                    with turn(device):
                        result |= _once(problem, call, exact, plain, before)
                    calls[name] = call
                except Exception as failure:
                    result |= {"status": "error", "error": describe(failure)}
                result["prepare_s"] = round(time.monotonic() - begin, 1)
        with measuring(), turn(device):
            for name, taken in turns_ms(calls, device).items():
                results[name]["time_ms"] = round(taken, 4)
                if device.type == "cuda" and taken < _HOST_MS:
                    results[name]["host_ms"] = round(host_time_us(calls[name]) / 1e3, 4)
    timed = {n: r["time_ms"] for n, r in results.items() if "time_ms" in r}
    peers = {n: taken for n, taken in timed.items() if not contestants[n].is_ours}
    for name, result in results.items():
        result["peers_ms"] = peers
        if contestants[name].is_ours:
            result["sources"] = sources
    return results


def _once(
    problem: Problem, call: Call, exact: torch.Tensor, plain: float, before: int
) -> dict[str, Any]:
    """How far a call's output is from fp32, and its memory."""
    for _ in range(2):
        out = call()
    error = _distance(problem, out, exact)
    right = error <= _WORSE * plain + 1e-6
    result = {"status": "ok" if right else "wrong", "error": error, "plain_error": plain}
    if problem.device.type == "cuda":
        del out
        _allocated(problem.device)
        torch.cuda.reset_peak_memory_stats()
        call()
        peak = torch.cuda.max_memory_allocated() - before
        result["peak_mb"] = round(peak / 2**20, 1)
    return result


def _allocated(device: torch.device) -> int:
    """Bytes of the GPU that hold something, without what only waits for Python's collector."""
    if device.type != "cuda":
        return 0
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def _prepare(
    contestant: Contestant, problem: Problem, budget_s: float, result: dict[str, Any]
) -> Call:
    """A forward as a contestant computes it; what a search found goes to `result`."""
    given = dict(problem.inputs)
    if contestant.attention == "stof":
        model = problem.sparse_model()
    else:
        model = problem.model(contestant.attention)
        form = {"eager": "additive", "sdpa": "bool"}.get(contestant.attention, "flex")
        given |= problem.masks(form)
    if contestant.liger:
        return _liger(model, given)
    if contestant.mode is not None:
        mode = None if contestant.mode == "default" else contestant.mode
        model = torch.compile(model, dynamic=False, mode=mode)
    if "unpad" in contestant.ours:
        import stof_hf

        stof_hf.unpad(model)
    if "tune" in contestant.ours:
        import stof_hf

        with turn(problem.device):
            report = stof_hf.tune(model, given, budget_s=budget_s, progress=False)
        result["search"] = searched(report)
    if "graphs" in contestant.ours:
        import stof_hf

        stof_hf.use_graphs(model)
    return lambda: model(**given)[0]


def _liger(model: nn.Module, given: dict[str, Any]) -> Call:
    """A call with what Liger-Kernel replaces, of which the module of the model's class is to keep
    nothing: the other contestants are of that class, too."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    module = sys.modules[type(model).__module__]
    own = dict(vars(module))
    apply_liger_kernel_to_llama(fused_linear_cross_entropy=False, model=model)
    theirs = {name: value for name, value in vars(module).items() if own.get(name) is not value}
    own = {name: own[name] for name in theirs}
    vars(module).update(own)

    def call() -> torch.Tensor:
        vars(module).update(theirs)
        try:
            return model(**given)[0]
        finally:
            vars(module).update(own)

    return call


def _reference(problem: Problem, dtype: torch.dtype) -> torch.Tensor:
    model = problem.model("eager", dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in problem.inputs.items()}
    return model(**inputs, **problem.masks("additive", dtype))[0].float()


def _distance(problem: Problem, out: torch.Tensor, exact: torch.Tensor) -> float:
    out, exact = problem.real(out), problem.real(exact)
    return float((out.float() - exact).norm() / exact.norm())


def table(data: dict[str, Any]) -> Table:
    """Milliseconds a forward, a row a cell; then its products alone, and how many times as fast as
    the best peer ours is: by the peer's time beside it, where it ran beside it."""
    shown = Table(
        "model", "B", "tokens", *CONTESTANTS, "products", "times the best peer",
        title="ms a forward",
    )  # fmt: skip
    for record in data["cells"]:
        times = {n: r["time_ms"] for n, r in record["results"].items() if "time_ms" in r}
        row = [f"{times[n]:.3f}" if n in times else "-" for n in CONTESTANTS]
        ratio = "-"
        peers = {n: taken for n, taken in times.items() if n not in OURS}
        if "tuned" in times and (peers := peers | record["results"]["tuned"]["peers_ms"]):
            ratio = f"{min(peers.values()) / times['tuned']:.2f}"
        ceiling = f"{record['ceiling_ms']:.3f}" if "ceiling_ms" in record else "-"
        shown.add_row(*map(str, record["cell"].values()), *row, ceiling, ratio)
    return shown
