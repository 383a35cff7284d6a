"""Tuned results as tables of the `stof cache` command."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .cache import TunedFile
from .entry import Entry
from .environment import Environment
from .keys import Key

__all__ = ["detail", "overview"]


def overview(files: Iterable[TunedFile], here: Environment) -> Group:
    """A table for each file, whose title says whether lookups in the environment `here` use it."""
    return Group(*[_results(file, here) for file in files] or [Text("nothing is tuned yet")])


def _results(file: TunedFile, here: Environment) -> Table:
    table = Table(title=escape(_title(file, here)), title_justify="left")
    for name in ("id", "model", "batch x tokens", "phase", "dtype", "mask", "time"):
        table.add_column(name)
    for key, entry in file.entries.items():
        size = f"{key.batch} x {key.seq_len}"
        cells = (key.id, entry.name, size, key.phase, key.dtype, key.mask, _time(entry))
        table.add_row(*map(escape, cells))
    return table


def detail(file: TunedFile, key: Key, entry: Entry) -> Group:
    """All that is known of one result."""
    about = Table(show_header=False, title=escape(entry.name))
    about.add_row("key", escape(str(key)))
    when = entry.measured.isoformat(" ", "seconds")
    about.add_row("measured", f"{entry.batch_size} x {entry.seq_len}, {when}")
    about.add_row("time", _time(entry))
    about.add_row("file", escape(str(file.path)))
    where = file.environment
    about.add_row("GPU", escape(f"{where.device}, driver {where.driver}, CUDA {where.cuda}"))
    versions = f"torch {where.torch}, triton {where.triton}, stof_hf {where.stof_hf}"
    about.add_row("versions", escape(f"{versions}, sources {where.sources}"))
    layers = Table()
    for name in ("layer", "scheme", "segment", "template", "parameters", "us"):
        layers.add_column(name, overflow="fold")
    for kind, layer in entry.layers.items():
        for i, segment in enumerate(layer.segments):
            first = (kind, layer.scheme) if i == 0 else ("", "")
            params = ", ".join(f"{name}={value}" for name, value in segment.params.items())
            cells = (*first, str(i), segment.template, params, f"{segment.time_us:.1f}")
            layers.add_row(*map(escape, cells))
        layers.add_section()
    return Group(about, layers)


def _title(file: TunedFile, here: Environment) -> str:
    device = file.environment.device
    if file.shipped:
        use = "used here" if device == here.device else "not used here"
        return f"{device}, shipped with stof_hf: {use}"
    differences = file.environment.differences(here)
    return f"{device}, not used here: {differences}" if differences else f"{device}, used here"


def _time(entry: Entry) -> str:
    gain = entry.baseline_us / entry.time_us
    return f"{entry.time_us / 1e3:.3f} ms, {gain:.2f} times as fast"
