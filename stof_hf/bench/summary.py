"""What a result file says: our time against the best peer's.

python -m stof_hf.bench.summary benchmarks/results/<gpu>/attention.json
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from rich.console import Console
from rich.table import Table

from .attention import load
from .contestants import CONTESTANTS, CUDA_ONLY, HALF_ONLY, NO_SUCH_MASK, Cell

__all__ = ["detail", "everything", "problems", "ratios", "summary"]

EXPECTED = (NO_SUCH_MASK, CUDA_ONLY, HALF_ONLY)
PEERS = tuple(name for name in CONTESTANTS if name != "stof")


def _time(record: dict[str, Any], name: str) -> float | None:
    return record["results"].get(name, {}).get("time_us")


def ratios(data: dict[str, Any], names: tuple[str, ...] = PEERS) -> list[tuple[Cell, float, str]]:
    """(cell, peer's time / our time, peer) of each cell, for the fastest of the peers `names`."""
    out = []
    for record in data["cells"]:
        ours = _time(record, "stof")
        times = [(t, n) for n in names if (t := _time(record, n)) is not None]
        if ours is not None and times:
            best, name = min(times)
            out.append((Cell(**record["cell"]), best / ours, name))
    return out


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def detail(data: dict[str, Any]) -> Table:
    """Times in microseconds of every contestant, a row a cell."""
    names = [n for n in CONTESTANTS if any(n in r["results"] for r in data["cells"])]
    names = [n for n in names if any(_shown(r, n) != "-" for r in data["cells"])]
    table = Table("mask", "B", "S", "D", "kept %", *names, title=f"us a call, {data['device']}")
    for column in table.columns[1:]:
        column.justify = "right"
    for record in data["cells"]:
        cell = Cell(**record["cell"])
        times = {n: t for n in names if (t := _time(record, n)) is not None}
        fastest = min(times, key=times.__getitem__, default=None)
        shown = [
            f"[bold]{_shown(record, n)}[/]" if n == fastest else _shown(record, n) for n in names
        ]
        size = (cell.batch, cell.seq_len, cell.head_dim, record.get("kept_percent", "-"))
        table.add_row(cell.mask, *map(str, size), *shown)
    return table


def _shown(record: dict[str, Any], name: str) -> str:
    result = record["results"].get(name, {"status": "unavailable"})
    if result["status"] == "ok":
        return _figure(result["time_us"])
    return "-" if result["status"] == "unavailable" else f"[red]{result['status']}[/]"


def summary(data: dict[str, Any]) -> Table:
    """Speed-up of "stof" over the best peer and over FlexAttention, geometric means a mask."""
    against = {
        "best peer": PEERS,
        "flex 128": ("flex_triton",),
        "flex 64": ("flex_triton64",),
        "sdpa, mask": ("sdpa_mask",),
    }
    columns = [f"vs {name}" for name in against]
    table = Table("mask", "D", "cells", *columns, "least vs best peer", title="times faster")
    for column in table.columns[1:]:
        column.justify = "right"
    kinds = dict.fromkeys((c["cell"]["mask"], c["cell"]["head_dim"]) for c in data["cells"])
    for mask, head_dim in kinds:
        rows = {
            name: [r for r in ratios(data, peers) if (r[0].mask, r[0].head_dim) == (mask, head_dim)]
            for name, peers in against.items()
        }
        if not rows["best peer"]:
            continue
        means = [f"{geometric_mean(r for _, r, _ in x):.2f}" if x else "-" for x in rows.values()]
        cell, least, peer = min(rows["best peer"], key=lambda row: row[1])
        worst = f"{least:.2f} ({peer}, B={cell.batch} S={cell.seq_len})"
        table.add_row(mask, str(head_dim), str(len(rows["best peer"])), *means, worst)
    return table


def problems(data: dict[str, Any]) -> list[str]:
    """A line for each contestant that was wrong, raised, or is missing without need."""
    return [
        f"{Cell(**record['cell'])}: {name} {result['status']}, "
        f"{result.get('error') or 'max error {:.3g}'.format(result['max_error'])}"
        for record in data["cells"]
        for name, result in record["results"].items()
        if result["status"] != "ok" and result.get("error") not in EXPECTED
    ]


def everything(data: dict[str, Any]) -> Table:
    """Everything that was measured, a row a contestant."""
    table = Table("cell", "contestant", "call us", "host us", "build ms", "peak MiB", "max error")
    for column in table.columns[2:]:
        column.justify = "right"
    for record in data["cells"]:
        for name, result in record["results"].items():
            if result["status"] == "ok":
                keys = ("time_us", "host_us", "build_ms", "peak_mb")
                figures = [_figure(result.get(key)) for key in keys]
                cell = str(Cell(**record["cell"]))
                table.add_row(cell, name, *figures, f"{result['max_error']:.1e}")
    return table


def main(path: str) -> None:
    data, console = load(Path(path)), Console(width=None if sys.stdout.isatty() else 140)
    console.print(detail(data), everything(data), summary(data))
    for line in problems(data):
        console.print(line, style="red", markup=False)


if __name__ == "__main__":
    main(sys.argv[1])
