"""A picture of a result file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .contestants import CONTESTANTS, Cell

__all__ = ["plot"]


def plot(data: dict[str, Any], path: Path) -> None:
    """Time over sequence length, a panel for each mask and (batch, head_dim), saved to `path`."""
    cells = [(Cell(**record["cell"]), record["results"]) for record in data["cells"]]
    masks = list(dict.fromkeys(cell.mask for cell, _ in cells))
    sizes = list(dict.fromkeys((cell.batch, cell.heads, cell.head_dim) for cell, _ in cells))
    figure = Figure(figsize=(3.2 * len(masks), 2.8 * len(sizes)), layout="constrained")
    panels = figure.subplots(len(sizes), len(masks), squeeze=False)
    drawn = {}
    for line, (batch, heads, head_dim) in enumerate(sizes):
        for column, mask in enumerate(masks):
            panel = panels[line][column]
            here = [
                (cell.seq_len, results)
                for cell, results in cells
                if (cell.mask, cell.batch, cell.heads, cell.head_dim)
                == (mask, batch, heads, head_dim)
            ]
            for color, name in enumerate(CONTESTANTS):
                points = sorted(
                    (s, results[name]["time_us"])
                    for s, results in here
                    if "time_us" in results.get(name, {})
                )
                if points:
                    width = 2.5 if name == "stof" else 1.2
                    style = {"marker": "o", "ms": 3, "lw": width, "color": f"C{color}"}
                    (drawn[name],) = panel.plot(*zip(*points, strict=True), **style)
            panel.set(xscale="log", yscale="log", title=f"{mask}, B={batch}, D={head_dim}")
            panel.grid(alpha=0.3)
        panels[line][0].set_ylabel("us a call")
    for panel in panels[-1]:
        panel.set_xlabel("sequence length")
    figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=len(drawn) or 1)
    figure.suptitle(f"Attention forward, {data['device']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
