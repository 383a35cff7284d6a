"""Whole layers as the search and its peers found them, measured in turns.

What each of them measured by itself would favour whom noise favoured.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..fusion.fused import Choice
from ..fusion.install import find
from ..kernels.constant import constant_weights
from ..runtime.recorder import no_collection
from ..tuning.environment import environment
from ..tuning.inputs import Inputs, run
from ..tuning.measure import measurer_for
from ..tuning.report import LayerReport, TuneReport
from ..tuning.sample import Sample, capture
from .search_peers import Borrowed, exhaustive_search, random_search
from .timing import CapturedCall, replay_times_us, turns_ms

__all__ = ["compare"]


def compare(
    model: nn.Module, inputs: Inputs, report: TuneReport, *, seeds: int, exhaustive_s: float,
    times_path: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """Let random search, and exhaustive search, look for what `stof_hf.tune` has found.

    Args:
        model, inputs: what was tuned, in this process; the model as it was before.
        seeds: random searches, each with as many measurements as the search took.
        exhaustive_s: seconds for the exhaustive search of all kinds of layers; 0 leaves it out.
        times_path: keeps what the exhaustive search measured; if the file is there, it goes on
            behind that.
    """
    layers = [found for found in find(model) if found.reason is None]
    device = next(model.parameters()).device
    with torch.no_grad(), measurer_for(device).compiling():
        samples = capture(model, layers, *run(model, inputs, report.phase))
        tuned = {layer.kind: layer for layer in report.layers}
        # As the search takes them: what is measured for one kind is known for the next.
        order = sorted(tuned, key=lambda kind: len(samples[kind].layer.operators))
        choices: dict[str, dict[str, Choice | None]] = {
            kind: {"own": None, "searched": _choice(tuned[kind])} for kind in order
        }
        for seed in range(seeds):
            borrowed = Borrowed(measurer_for(device))
            for kind in order:
                choice = random_search(samples[kind], borrowed, tuned[kind].measurements, seed)
                if choice is not None:
                    choices[kind][f"random {seed}"] = choice
        data: dict[str, Any] = {}
        if exhaustive_s:
            found, data["exhaustive"] = _exhaustive(
                {kind: samples[kind] for kind in order}, device, exhaustive_s, times_path
            )
            for kind, choice in found.items():
                choices[kind]["exhaustive"] = choice
        data["kinds"] = [
            {
                "kind": kind,
                "count": tuned[kind].count,
                "measurements": tuned[kind].measurements,
                "times_us": _times_us(samples[kind], choices[kind]),
                "choices": {n: c and asdict(c) for n, c in choices[kind].items()},
            }
            for kind in tuned
        ]
    return data


def _times_kept(path: Path | None, device: torch.device) -> dict[str, float]:
    """What an exhaustive search measured before, with the same sources: key -> microseconds."""
    if path is None or not path.exists():
        return {}
    data = json.loads(path.read_text())
    if data["of"] != environment(device).digest:
        return {}
    return {key: math.inf if taken is None else taken for key, taken in data["times"].items()}


def _choice(layer: LayerReport) -> Choice:
    return Choice(layer.scheme, tuple((s.template, s.params) for s in layer.segments))


def _exhaustive(
    samples: Mapping[str, Sample], device: torch.device, budget_s: float, path: Path | None
) -> tuple[dict[str, Choice], dict[str, Any]]:
    """What is found of each kind, and how much of all there is was measured."""
    begin = time.monotonic()
    borrowed = Borrowed(measurer_for(device))
    borrowed.times |= _times_kept(path, device)

    def save() -> None:
        if device.type == "cuda":
            # Behind a kernel that broke the context, all others seem to fail.
            torch.cuda.synchronize(device)
        if path is not None:
            times = {k: None if math.isinf(t) else t for k, t in borrowed.times.items()}
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".partial")
            data = {"of": environment(device).digest, "times": times}
            part.write_text(json.dumps(data, indent=1) + "\n")
            os.replace(part, path)

    found: dict[str, Choice] = {}
    candidates: set[str] = set()
    for left, kind in zip(range(len(samples), 0, -1), samples, strict=True):
        share_s = (begin + budget_s - time.monotonic()) / left
        choice, keys = exhaustive_search(samples[kind], borrowed, share_s, save)
        candidates |= keys
        if choice is not None:
            found[kind] = choice
    return found, {
        "measured": len(candidates & borrowed.times.keys()), "candidates": len(candidates),
        "seconds": round(time.monotonic() - begin, 1),
    }  # fmt: skip


def _times_us(sample: Sample, choices: Mapping[str, Choice | None]) -> dict[str, float]:
    """Microseconds of one layer, without those that fail or compute something else."""
    on_gpu = sample.hidden.is_cuda
    calls: dict[str, Any] = {}
    for name, choice in choices.items():
        try:
            layers = sample.layer_calls(choice)
            call = partial(_call_all, layers)
            call()
            with no_collection(), constant_weights():
                calls[name] = CapturedCall(call) if on_gpu else call
        except Exception:  # kernels fail in many ways
            continue
    if on_gpu:
        times = dict(zip(calls, replay_times_us([*calls.values()]), strict=True))
    else:
        measured = turns_ms(calls, sample.hidden.device)
        times = {name: taken * 1e3 for name, taken in measured.items()}
    return {name: round(taken / len(sample.weights), 3) for name, taken in times.items()}


def _call_all(calls: Iterable[Callable[[], Any]]) -> None:
    for call in calls:
        call()
