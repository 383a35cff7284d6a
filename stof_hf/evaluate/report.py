"""What `evaluate` found, as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table

__all__ = ["plot", "table"]

#: Where the worst perplexity is more times the best one than this, they are drawn logarithmically.
_FAR = 3


def table(data: dict[str, Any]) -> Table:
    """Quality, mask density and speed, a row a pattern."""
    losses = data["metric"] != "similarity"
    names = ("more nats a token than dense",) if losses else ("5 % quantile",)
    shown = Table("attention", data["metric"], *names, "density", "ms", "tokens/s", "speed-up")
    for column in shown.columns[1:]:
        column.justify = "right"
    for result in data["results"]:
        quality = result["quality"]
        if losses:
            error = quality["standard_error"]
            spread = "" if error is None else f" ± {error:.4f}"
            figures = f"{quality['value']:.3f}", f"{quality['difference']:+.4f}{spread}"
        else:
            figures = f"{quality['value']:.4f}", f"{quality['q05']:.4f}"
        shown.add_row(
            escape(result["label"]), *figures, f"{result['density']:.1%}",
            f"{result['time_ms']:.2f}", f"{result['tokens_per_second']:,.0f}",
            f"{result['speedup']:.2f}",
        )  # fmt: skip
    return shown


def plot(data: dict[str, Any], path: Path) -> None:
    """Quality over density, coloured by speed, dense attention as a star; saved to `path`."""
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    panel = figure.subplots()
    results = data["results"]
    densities = [100 * result["density"] for result in results]
    values = [result["quality"]["value"] for result in results]
    speeds = [result["speedup"] for result in results]
    # Noise of a few percent is not to look like a difference.
    colors = {"cmap": "viridis", "vmin": min(0.8, *speeds), "vmax": max(1.2, *speeds)}
    panel.axhline(values[0], color="0.6", lw=1, ls="--")
    panel.scatter(densities[1:], values[1:], c=speeds[1:], s=60, edgecolors="0.3", **colors)
    star = panel.scatter(
        densities[:1], values[:1], c=speeds[:1], s=200, marker="*", edgecolors="0.3", **colors
    )
    middle = (min(densities) + max(densities)) / 2
    for i, result in enumerate(results):
        side = -1 if densities[i] > middle else 1
        panel.annotate(
            "dense" if i == 0 else f"{result['label']}, {speeds[i]:.2f}x",
            (densities[i], values[i]), fontsize=8, textcoords="offset points",
            xytext=(8 * side, 5 if i else -12), ha="left" if side > 0 else "right",
        )  # fmt: skip
    figure.colorbar(star, label="times as fast as dense")
    if data["metric"] != "similarity" and max(values) > _FAR * min(values):
        panel.set_yscale("log")
    better = "higher" if data["metric"] == "similarity" else "lower"
    panel.set(xlabel="density of the mask in %", ylabel=f"{data['metric']} ({better} is better)")
    panel.set_title(
        f"{Path(data['model']).name}, {data['dtype']}, {data['environment']['device']}\n"
        f"{data['windows']} windows of {data['seq_len']} tokens",
        fontsize=10,
    )
    panel.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
