"""Attention forward on identical masks, every contestant in one process.

Results are JSON, one file a GPU, saved after each cell, so that a run that was cut short goes on
where it stopped. A contestant whose result differs from the fp32 reference gets no time.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import platform
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config

from ..errors import StofError
from . import timing
from .contestants import CONTESTANTS, Cell, Contestant, Problem
from .masks import MASKS, bench_mask

__all__ = [
    "cells", "default_device", "environment", "grid", "known_contestants", "load", "run", "save",
    "source_hash",
]  # fmt: skip

FORMAT = 1
# Largest allowed (absolute error of one element, norm of the error over the norm of the reference):
# one element catches a lost key in a short row, the norm catches many small ones in long rows.
TOLERANCE = {"float16": (1e-2, 5e-3), "bfloat16": (5e-2, 3e-2), "float32": (1e-4, 1e-4)}

Record = dict[str, Any]


def grid(
    masks: Iterable[str] = MASKS,
    batch: Iterable[int] = (1, 8, 16),
    seq_len: Iterable[int] = (128, 256, 512, 1024, 2048, 4096),
    *,
    heads: int = 12,
    kv_heads: int | None = None,
    head_dim: int = 64,
    dtype: str = "float16",
) -> list[Cell]:
    """The cells of every mask, batch size and length.

    >>> len(grid(["causal"], batch=[1, 8], seq_len=[128, 256, 512]))
    6
    """
    return [
        Cell(mask, b, heads, kv_heads or heads, s, head_dim, dtype)
        for mask, b, s in product(masks, batch, seq_len)
    ]


def cells(
    device: torch.device, masks: Iterable[str], *, quick: bool = False, **sizes: Any
) -> list[Cell]:
    """The grid that `sizes` (as for `grid`) name, else the usual one of the device."""
    if device.type == "cuda":
        if sizes or quick:
            return grid(masks, **({"batch": [1], "seq_len": [512, 4096]} | sizes))
        large = {"heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}
        return grid(masks) + grid(masks, [1], [4096, 16384, 32768], **large)
    lengths = [1024] if quick else [512, 1024, 4096]
    return grid(masks, **({"batch": [1], "seq_len": lengths, "dtype": "float32"} | sizes))


def default_device(name: str | None = None) -> torch.device:
    """The device called `name`, else the GPU where there is one.

    Raises StofError for a name that is no device here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise StofError(f"device {name!r} cannot be used: {reason}; try --device cpu") from error
    return device


def source_hash() -> str:
    """Hash of the sources that our attention's time depends on: attention, masks and csrc."""
    package = Path(__file__).parents[1]
    csrc = next((d for d in (package / "csrc", package.parent / "csrc") if d.is_dir()), None)
    files = [*(package / "attention").glob("*.py"), *(package / "masks").glob("*.py")]
    if csrc:
        files += [f for f in csrc.rglob("*") if f.suffix in (".cpp", ".cu", ".cuh", ".h")]
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda f: (f.parent.name, f.name)):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def environment(device: torch.device) -> dict[str, Any]:
    """Device and versions that results hold for."""
    packages = ("torch", "triton", "flash-attn-4", "nvidia-cutlass-dsl")
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        versions["cuda"] = torch.version.cuda
        versions["cudnn"] = str(torch.backends.cudnn.version())
    else:
        name = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        name += f", {torch.get_num_threads()} threads"
    return {"device": name, "versions": versions}


def known_contestants(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """The names; raises StofError where one is not among those that there are."""
    chosen = list(names)
    if unknown := set(chosen) - set(known):
        raise StofError(f"no contestant is called {min(unknown)!r}; there are {', '.join(known)}")
    return chosen


def load(path: Path) -> dict[str, Any]:
    """Read a result file; raises StofError where it is not one."""
    try:
        data = json.loads(path.read_text())
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}")
    except (ValueError, KeyError, TypeError) as error:
        raise StofError(f"{path} holds no benchmark results ({error}); name another") from error
    return data


def _open(path: Path | None, device: torch.device) -> dict[str, Any]:
    here = environment(device)
    if path is None or not path.exists():
        return {"format": FORMAT, **here, "sources": source_hash(), "cells": []}
    data = load(path)
    if (data["device"], data["versions"]) != (here["device"], here["versions"]):
        raise StofError(
            f"{path} holds results of {data['device']} with {data['versions']}; this is "
            f"{here['device']} with {here['versions']}. Name another file with --json."
        )
    data["sources"] = source_hash()
    return data


def save(data: dict[str, Any], path: Path | None) -> None:
    """Write a result file, if a path is given."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    partial.replace(path)


def run(
    cells: Iterable[Cell],
    *,
    contestants: Iterable[str] = tuple(CONTESTANTS),
    device: torch.device,
    json_path: Path | None = None,
    jobs: int = 0,
    progress: Callable[[Cell, Record], None] = lambda cell, record: None,
) -> dict[str, Any]:
    """Measure `cells` and return the results, which are also kept in `json_path`.

    Cells and contestants that the file already holds are skipped, except "stof" where its sources
    have changed since. jobs > 0 fills the compilers' caches in that many processes beforehand.

    Raises StofError where the file holds results of another device or of other versions, and where
    a kernel left the GPU unusable; what was measured until then is in the file.
    """
    names = known_contestants(contestants, CONTESTANTS)
    chosen = [CONTESTANTS[name] for name in CONTESTANTS if name in names]
    data = _open(json_path, device)
    todo = list(_missing(data, list(cells), chosen, device))
    if device.type == "cuda":
        _prepare_compilers()
        if jobs:
            _compile_ahead(todo, str(device), jobs)
    with torch.no_grad():
        for cell, record, missing in todo:
            try:
                _measure_cell(cell, record, missing, device)
            finally:
                save(data, json_path)
            progress(cell, record)
    return data


def _missing(
    data: dict[str, Any], cells: list[Cell], chosen: list[Contestant], device: torch.device
) -> Iterator[tuple[Cell, Record, list[Contestant]]]:
    """Of each cell with something left to measure: its record in `data`, and who is missing."""
    known = {Cell(**record["cell"]): record for record in data["cells"]}
    for cell in cells:
        record = known.get(cell)
        if record is None:
            record = {"cell": asdict(cell), "results": {}}
            data["cells"].append(record)
        results = record["results"]
        if results.get("stof", {}).get("sources", data["sources"]) != data["sources"]:
            del results["stof"]
        missing = []
        for contestant in chosen:
            if contestant.name in results:
                continue
            if reason := contestant.unavailable(cell, device):
                results[contestant.name] = {"status": "unavailable", "error": reason}
            else:
                missing.append(contestant)
        if missing:
            yield cell, record, missing


def _measure_cell(
    cell: Cell, record: Record, missing: list[Contestant], device: torch.device
) -> None:
    mask = bench_mask(cell.mask, cell.seq_len, device)
    problem = Problem.make(cell, mask, device)
    reference = problem.reference()
    record["kept_percent"] = round(mask.kept_percent(device), 2)
    results, captured = record["results"], {}
    try:
        for contestant in missing:
            name = contestant.name
            try:
                results[name] = _measure(contestant, problem, reference, captured)
            except Exception as error:
                results[name] = {"status": "error", "error": describe(error)}
                captured.pop(name, None)
            if name == "stof":
                results[name]["sources"] = source_hash()
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
        name = None
        times = timing.replay_times_us([*captured.values()])
    except RuntimeError as error:
        reason = describe(error)
        # Their GPU time was still to come.
        for other in captured:
            del results[other]
        if name is not None:
            results[name] = {"status": "error", "error": reason}
        raise StofError(
            f"{name or 'one of the contestants'} on {cell} left the GPU unusable: {reason}. What "
            "was measured is saved; the same command again goes on behind it."
        ) from error
    for name, time_us in zip(captured, times, strict=True):
        results[name]["time_us"] = round(time_us, 3)


def _measure(
    contestant: Contestant, problem: Problem, reference: torch.Tensor,
    captured: dict[str, timing.CapturedCall],
) -> Record:  # fmt: skip
    """All but the GPU time, which needs what is put into `captured`."""
    device, result = problem.device, {"status": "ok"}
    mask = contestant.build(problem) if contestant.build else None
    with contestant.prepare(problem, mask) as call:
        difference = call().float() - reference
        result["max_error"] = float(difference.abs().max())
        result["rel_error"] = float(difference.norm() / reference.norm())
        most, norm = TOLERANCE[problem.cell.dtype]
        if not (result["max_error"] <= most and result["rel_error"] <= norm):
            return {**result, "status": "wrong"}
        del difference
        if device.type == "cuda":
            result["peak_mb"] = round(timing.peak_memory_mb(call), 2)
            result["host_us"] = round(timing.host_time_us(call), 2)
            captured[contestant.name] = timing.CapturedCall(call)
        else:
            result["time_us"] = round(timing.wall_time_us(call), 3)
    if contestant.build:
        build = contestant.build
        result["build_ms"] = round(timing.build_time_ms(lambda: build(problem), device), 3)
        if not contestant.compiled:
            # What a kernel derives from a mask at its first use is part of the mask's price.
            first = partial(_first_call, contestant, problem)
            result["build_and_call_ms"] = round(timing.build_time_ms(first, device), 3)
    return result


def _first_call(contestant: Contestant, problem: Problem) -> None:
    with contestant.prepare(problem, contestant.build(problem)) as call:
        call()


def describe(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(where.filename).name}:{where.lineno}"
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''} ({place})"


def _compile_ahead(
    todo: list[tuple[Cell, Record, list[Contestant]]], device: str, jobs: int
) -> None:
    """Fill the on-disk caches of Inductor, Triton and CuTe in parallel; failures show up later."""
    tasks = [(cell, c.name) for cell, _, missing in todo for c in missing if c.compiled]
    if not tasks:
        return
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        jobs, mp_context=spawn, initializer=_prepare_compilers
    ) as pool:
        waiting = [pool.submit(_compile, cell, name, device) for cell, name in tasks]
        concurrent.futures.wait(waiting)


def _prepare_compilers() -> None:
    """No pool of threads to compile one kernel a graph; a cache on disk for CuTe kernels too."""
    torch._inductor.config.compile_threads = 1
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")


def _compile(cell: Cell, name: str, device: str) -> None:
    where = torch.device(device)
    mask, contestant = bench_mask(cell.mask, cell.seq_len, where), CONTESTANTS[name]
    problem = Problem.make(cell, mask, where)
    built = contestant.build(problem) if contestant.build else None
    with torch.no_grad(), contestant.prepare(problem, built) as call:
        call()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
