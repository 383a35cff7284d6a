"""Results of cells of the zoo, in one JSON file that several processes may fill."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from ..errors import StofError
from ..tuning.report import TuneReport
from .attention import environment, load, save
from .turns import file_lock
from .zoo import Cell

__all__ = ["keep", "kept", "model_environment", "records", "searched"]

Record = dict[str, Any]


def model_environment(device: torch.device) -> dict[str, Any]:
    """Device and versions that results of models hold for."""
    here = environment(device)
    here["versions"]["transformers"] = transformers.__version__
    return here


def kept(path: Path | None, empty: dict[str, Any]) -> dict[str, Any]:
    """What a file holds, or `empty` where there is none.

    Raises StofError where it is of another device or other versions than `empty`.
    """
    if path is None or not path.exists():
        return empty
    data = load(path)
    if any(data[name] != empty[name] for name in ("device", "versions")):
        raise StofError(f"{path} holds results of other versions or of another device")
    return data


def keep(record: Record, path: Path | None, data: dict[str, Any]) -> dict[str, Any]:
    """All results with a cell's, which other processes may have added to meanwhile."""
    with file_lock(path) if path is not None else nullcontext():
        cells = records(data if path is None else kept(path, {**data, "cells": []}))
        cells[Cell(**record["cell"])] = record
        data = {**data, "cells": list(cells.values())}
        save(data, path)
    return data


def records(data: dict[str, Any]) -> dict[Cell, Record]:
    """The records of a file by their cells."""
    return {Cell(**record["cell"]): record for record in data["cells"]}


def searched(report: TuneReport) -> Record:
    """What `stof_hf.tune` found, without the course of the search."""
    return {
        "seconds": round(report.seconds, 2),
        "measurements": report.measurements,
        "layers": [{**asdict(layer), "course": None} for layer in report.layers],
        "skipped": report.skipped,
    }
