"""How near each cell of a result file comes to what the GPU can do: a roofline picture.

The model of Williams, Waterman and Patterson (CACM 52(4), 2009): a call can compute no faster than
the tensor cores do, and read no faster than device memory delivers.
"""

from __future__ import annotations

from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from ..errors import UnsupportedError
from .contestants import Cell
from .masks import MASKS
from .summary import PEERS

__all__ = ["ROOFS", "points", "roofline", "work"]

#: FLOP/s of fp16 products and bytes/s of device memory that were measured, by device.
ROOFS = {"NVIDIA H200": (790e12, 4.3e12)}


def work(cell: Cell, kept_percent: float) -> tuple[float, float]:
    """(FLOP, bytes) that a cell takes at least: the pairs that its mask keeps, each tensor once.

    >>> work(Cell("causal", 1, 12, 12, 128, 64, "float16"), 50.0)
    (25165824.0, 786432.0)
    """
    pairs = cell.batch * cell.heads * cell.seq_len**2 * kept_percent / 100
    item = torch.empty(0, dtype=getattr(torch, cell.dtype)).element_size()
    rows = cell.batch * cell.seq_len * 2 * (cell.heads + cell.kv_heads)
    return 4.0 * pairs * cell.head_dim, float(item * cell.head_dim * rows)


def points(data: dict[str, Any]) -> list[tuple[Cell, float, float, float]]:
    """(cell, FLOP a byte, our FLOP/s, the best peer's or NaN) of the cells that we computed."""
    out = []
    for record in data["cells"]:
        times = {n: r["time_us"] * 1e-6 for n, r in record["results"].items() if "time_us" in r}
        if "stof" in times:
            cell = Cell(**record["cell"])
            flop, size = work(cell, record["kept_percent"])
            best = min((times[n] for n in PEERS if n in times), default=float("nan"))
            out.append((cell, flop / size, flop / times["stof"], flop / best))
    return out


def roofline(data: dict[str, Any], path: Path) -> dict[str, float]:
    """Draw ours and the best peer of each cell below the GPU's roofs, and save it to `path`.

    Returns:
        The share of its roof that we reach, for each mask: geometric mean over its cells with at
        least 1024 tokens.

    Raises:
        UnsupportedError: nobody measured the roofs of the results' device.
    """
    if data["device"] not in ROOFS:
        raise UnsupportedError(
            f"the roofs of {data['device']!r} are not known, only those of {', '.join(ROOFS)}: "
            "measure them and add them to stof_hf/bench/roofline.py"
        )
    peak, bandwidth = ROOFS[data["device"]]
    figure = Figure(figsize=(9, 6), layout="constrained")
    panel = figure.subplots()
    found = points(data)
    reach: dict[str, list[float]] = {}
    for color, mask in enumerate(MASKS):
        here = [point for point in found if point[0].mask == mask]
        for head_dim, marker in ((64, "o"), (128, "s")):
            some = [point for point in here if point[0].head_dim == head_dim]
            if some:
                _, intensity, ours, best = zip(*some, strict=True)
                style = {"marker": marker, "s": 22, "color": f"C{color}"}
                panel.scatter(intensity, ours, **style, label=f"{mask}, D={head_dim}")
                panel.scatter(intensity, best, **style | {"color": "none"}, edgecolors=f"C{color}")
        long = [point for point in here if point[0].seq_len >= 1024]
        if long:
            reach[mask] = geometric_mean(y / min(peak, bandwidth * x) for _, x, y, _ in long)
    x = np.geomspace(1, 1e5, 200)
    panel.plot(x, np.minimum(peak, bandwidth * x), color="k", lw=1)
    panel.set(
        xscale="log", yscale="log", xlabel="FLOP a byte of device memory", ylabel="FLOP/s",
        title=f"Attention forward, {data['device']}: filled ours, hollow the best peer",
    )  # fmt: skip
    panel.set(ylim=(1e11, 2 * peak))
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return reach
