"""What `tune` and `apply_tuned` did: as a table, JSON, and a picture."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

__all__ = ["LayerReport", "SegmentReport", "TuneReport"]


@dataclass(frozen=True)
class SegmentReport:
    """Args: operators; template and params: what computes them; before_us, time_us: one by one by
    PyTorch, and now."""

    operators: tuple[str, ...]
    template: str
    params: dict[str, int]
    before_us: float | None
    time_us: float


@dataclass(frozen=True)
class LayerReport:
    """What was found for layers of a kind, and for a shape.

    Args:
        count: layers of the kind.
        time_us, baseline_us: one layer with what was found, and its own code; None where that was
            not measured.
        kept: whether it is used: only where it is faster.
        course: (measurements, the layer's time by then).
        measurements: of segments, all that the search took.
        note: why it is not kept, or where it comes from.
    """

    kind: str
    count: int
    batch_size: int
    seq_len: int
    scheme: str
    segments: tuple[SegmentReport, ...]
    time_us: float | None
    baseline_us: float | None
    kept: bool
    course: tuple[tuple[int, float], ...] = ()
    measurements: int = 0
    note: str = ""


@dataclass
class TuneReport:
    """What was searched, found and installed.

    Args:
        model: its name or class. device: the GPU's name, or "cpu".
        layers: one for each kind and shape.
        skipped: name of a layer that is left alone -> why, in one line.
        installed: how many layers run fused now.
        measurements, seconds: what the search took.
        interrupted: whether Ctrl-C ended it early.
        timings: all times that were measured, by what they hold for; `measure.Recorded` takes them.

    `print(report)` shows a table, `report.plot()` a picture.
    """

    model: str
    device: str
    dtype: str
    phase: str
    layers: list[LayerReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    installed: int = 0
    measurements: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    timings: dict[str, float | None] = field(default_factory=dict, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dicts."""
        return asdict(self)

    def __rich__(self) -> Group:
        lines: list[Any] = [part for layer in self.layers for part in _shown(layer)]
        lines += [Text(f"{name} runs its own code: {why}") for name, why in self.skipped.items()]
        lines.append(Text(self._summary()))
        return Group(*lines)

    def _summary(self) -> str:
        early = ", stopped early" if self.interrupted else ""
        return (
            f"{self.model}, {self.dtype}, {self.phase}, on {self.device}: {self.measurements} "
            f"measurements in {self.seconds:.1f} s{early}; layers that run fused: {self.installed}"
        )

    def __str__(self) -> str:
        # Else a notebook would show the table itself, and the text would be empty.
        console = Console(file=io.StringIO(), width=120, force_terminal=False, force_jupyter=False)
        console.print(self)
        return console.file.getvalue().rstrip()

    __repr__ = __str__

    def plot(self, path: Any = None) -> Any:
        """Draw the time of each segment before and after, and the course of each search.

        Args:
            path: also save the picture here.

        Returns:
            A matplotlib Figure.
        """
        from matplotlib.figure import Figure

        layers = self.layers or [None]
        figure = Figure(figsize=(11, 3.2 * len(layers)), layout="constrained")
        grid = figure.subplots(len(layers), 2, squeeze=False, width_ratios=(2, 1))
        for (bars, course), layer in zip(grid, layers, strict=True):
            if layer is not None:
                _draw(bars, course, layer)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


def _shown(layer: LayerReport) -> tuple[Text, Table]:
    title = f"{layer.count} x {layer.kind}, {layer.batch_size} x {layer.seq_len}"
    if layer.baseline_us is not None and layer.time_us is not None:
        gain = layer.baseline_us / layer.time_us
        title += f": {layer.baseline_us:.1f} -> {layer.time_us:.1f} us, {gain:.2f} times as fast"
    title += f" ({layer.note})" if layer.note else ""
    table = Table()
    for name in ("segment", "computed by", "parameters"):
        table.add_column(name, overflow="fold")
    for name in ("before us", "after us"):
        table.add_column(name, justify="right")
    for segment in layer.segments:
        params = ", ".join(f"{name}={value}" for name, value in segment.params.items())
        before = "" if segment.before_us is None else f"{segment.before_us:.1f}"
        cells = (" ".join(segment.operators), segment.template, params, before)
        table.add_row(*map(escape, cells), f"{segment.time_us:.1f}")
    # A table's own title would be broken to its width.
    return Text(title), table


def _draw(bars: Any, course: Any, layer: LayerReport) -> None:
    names = [" ".join(segment.operators) for segment in layer.segments]
    places = range(len(names))
    before = [segment.before_us or 0.0 for segment in layer.segments]
    after = [segment.time_us for segment in layer.segments]
    bars.barh([p - 0.2 for p in places], before, 0.4, label="one by one", color="0.7")
    bars.barh([p + 0.2 for p in places], after, 0.4, label="tuned", color="C0")
    bars.set_yticks(list(places), names, fontsize=7)
    bars.invert_yaxis()
    bars.set_xlabel("us")
    bars.set_title(f"{layer.kind}, {layer.batch_size} x {layer.seq_len}", fontsize=9)
    bars.legend(fontsize=7)
    if layer.course:
        counts, times = zip(*layer.course, strict=True)
        course.step(counts, times, where="post", marker=".")
    course.set_xlabel("measurements")
    course.set_ylabel("us a layer")
    course.set_title("course of the search", fontsize=9)
