"""Whether the search earns its keep: what it costs, and how near it comes to what can be found.

A cell is searched in a new process with empty caches, of tuned results and of Triton's; the host's
and the CUDA kernels are built already (`stof build`). Beside it run random searches with as many
measurements, and where wanted an exhaustive one; what each found is measured in turns at the end.
Then two more processes load the model: one installs what the search has left in the caches and runs
two forwards, the other runs them untuned. The difference is what a cache hit costs beyond loading
the model and building its graph. The untuned one comes last: whom files read before favour is not
the hit.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ..kernels import jit
from ..tuning import environment as tuned
from . import fresh
from .apart import alone
from .attention import FORMAT
from .records import Record, keep, kept, model_environment, records
from .zoo import Cell

__all__ = ["covered", "layers_us", "ratios", "run", "table"]


def run(
    chosen: Iterable[Cell], progress: Callable[[Cell, Record], None], *, device: torch.device,
    budget_s: float, seeds: int, exhaustive: Container[Cell] = (), exhaustive_s: float = 600,
    json_path: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure cells, and return their results, which are also kept in `json_path`.

    Cells that the file holds with this budget, as many seeds and the same sources are skipped, but
    for those whose exhaustive search has not come to its end: it goes on where it stopped.

    Args:
        progress: is called with each cell that is done, and its record.
        budget_s: seconds for `stof_hf.tune`.
        seeds: random searches.
        exhaustive: cells that are searched exhaustively, each for `exhaustive_s` seconds at most.
    """
    chosen = list(chosen)
    sources = tuned.environment(device).sources
    data = kept(json_path, {"format": FORMAT, **model_environment(device), "cells": []})
    for cell in chosen:
        seconds = exhaustive_s if cell in exhaustive else 0
        record = records(data).get(cell)
        if record is None or not _holds(record, sources, budget_s, seeds, bool(seconds)):
            measured = _measure(
                cell, device, budget_s=budget_s, seeds=seeds, exhaustive_s=seconds,
                times_path=_times_path(json_path, cell) if seconds else None,
            )  # fmt: skip
            record = {"cell": asdict(cell), "sources": sources, **measured}
            data = keep(record, json_path, data)
        progress(cell, record)
    return {**data, "cells": [records(data)[cell] for cell in chosen]}


def _holds(record: Record, sources: str, budget_s: float, seeds: int, exhaustive: bool) -> bool:
    return (
        record["sources"] == sources
        and record["search"]["budget_s"] == budget_s
        and record["seeds"] >= seeds
        and (not exhaustive or covered(record) == 1)
    )


def _times_path(json_path: Path | None, cell: Cell) -> Path | None:
    """What an exhaustive search measured, beside the results."""
    if json_path is None:
        return None
    return json_path.with_name(
        f"{json_path.stem}.{cell.model}-{cell.batch}x{cell.tokens}.times.json"
    )


def _measure(cell: Cell, device: torch.device, *, seeds: int, **options: Any) -> Record:
    with new_caches() as environ:
        found = alone(fresh.search, cell, device, seeds=seeds, environ=environ, **options)
        hit, plain = (
            alone(fresh.first_forwards, cell, device, tuned=tuned, environ=environ)
            for tuned in (True, False)
        )
    beyond = sum(hit.values()) - sum(plain.values())
    hit = {"seconds": round(beyond, 3), **hit, "plain_forwards_s": plain["forwards_s"]}
    return {"seeds": seeds, **found, "hit": hit}


@contextmanager
def new_caches() -> Iterator[dict[str, str]]:
    """Environment variables that stand for empty caches, but with the kernels that are built."""
    kernels = (jit.cache_dir() / "kernels").absolute()
    kernels.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="stof-bench-") as name:
        folder = Path(name)
        (folder / "kernels").symlink_to(kernels, target_is_directory=True)
        yield {"STOF_CACHE_DIR": name, "TRITON_CACHE_DIR": str(folder / "triton")}


def layers_us(record: Record) -> dict[str, float]:
    """Microseconds of all layers of a forward, as each search found them: name -> time.

    Searches of which a kind of layers has no time are left out.
    """
    kinds = record["kinds"]
    names = [name for name in kinds[0]["times_us"] if all(name in k["times_us"] for k in kinds)]
    return {name: sum(k["count"] * k["times_us"][name] for k in kinds) for name in names}


def ratios(record: Record) -> dict[str, float]:
    """Time of what peers found over that of what the search found.

    "random" is the fastest of the random searches, "median random" their median.
    """
    times = layers_us(record)
    if "searched" not in times:
        return {}
    drawn = [taken for name, taken in times.items() if name.startswith("random")]
    peers = {"own": times.get("own"), "exhaustive": times.get("exhaustive")}
    peers |= {"random": min(drawn), "median random": statistics.median(drawn)} if drawn else {}
    return {name: t / times["searched"] for name, t in peers.items() if t is not None}


def covered(record: Record) -> float | None:
    """The share of candidates that the exhaustive search measured; None where it did not run."""
    found = record.get("exhaustive")
    return found and found["measured"] / found["candidates"]


def table(data: dict[str, Any]) -> Table:
    """A row a cell: what the search costs, microseconds of all layers of a forward, and what peers
    found, as times of what the search found."""
    shown = Table(
        "model", "B", "tokens", "search s", "measurements", "hit s", "own us", "searched us",
        "best random / searched", "median random / searched", "searched / exhaustive", "covered",
    )  # fmt: skip
    for record in data["cells"]:
        times, ratio, share = layers_us(record), ratios(record), covered(record)
        shown.add_row(
            *map(str, record["cell"].values()),
            f"{record['search']['seconds']:.1f}",
            str(record["search"]["measurements"]),
            f"{record['hit']['seconds']:.2f}",
            *(f"{times[name]:.1f}" if name in times else "-" for name in ("own", "searched")),
            *(f"{ratio[n]:.3f}" if n in ratio else "-" for n in ("random", "median random")),
            f"{1 / ratio['exhaustive']:.3f}" if "exhaustive" in ratio else "-",
            "-" if share is None else f"{share:.1%}",
        )
    return shown
