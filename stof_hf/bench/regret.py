"""What the selection costs: the time of the kernel that select.py chooses, over that of the best.

python -m stof_hf.bench.regret OUT.json [mask ...] measures every configuration that could compute a
cell of the grid.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch

from ..attention import calls, cuda, cuda_band, sdpa, select, triton
from . import timing
from .attention import cells
from .contestants import CONTESTANTS, Cell, Problem
from .masks import MASKS, bench_mask

__all__ = ["measure"]

LAYOUTS = {"rows": (2, False, False), "paired": (1, True, False), "heads": (1, False, True)}


def configurations(problem: Problem, mask: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each kernel and layout that could compute the problem, ready to be called."""
    q, k, v, scale = problem.q, problem.k, problem.v, problem.cell.head_dim**-0.5
    chosen = select.cuda_config(q, k, v, mask)
    family = cuda.families(q, k, v, mask, None, scale, 0.0)[0]
    for name, (tiles, paired, two_heads) in LAYOUTS.items():
        if two_heads and problem.cell.heads // problem.cell.kv_heads % 2:
            continue
        layout = replace(chosen.layout, tiles=tiles, paired=paired)
        config = replace(chosen, layout=layout, two_heads=two_heads)
        call = cuda.BlockCall(family, q, k, v, mask, None, None, scale, 0.0, config)
        yield name, lambda call=call: call(q, k, v, mask, None, None)
    if cuda_band.computes(q, k, v, mask, None, scale, 0.0):
        for form in select.band_forms(q, k):
            band = cuda_band.BandCall(q, k, v, mask, None, scale, False, form)
            yield f"band {form.rows} {form.heads}", partial(band, q, k, v, mask, None, None)
    options = {"bias": None, "sinks": None, "scale": scale, "softcap": 0.0}
    if problem.cell.mask in ("causal", "full"):
        cudnn = sdpa.CudnnCall(scale, problem.cell.mask == "causal", False)
        yield "cudnn", lambda: cudnn(q, k, v)
    yield "triton", lambda: calls.forward("triton calls", triton.prepare, q, k, v, mask, **options)


def measure(cell: Cell, device: torch.device) -> dict[str, Any]:
    """Times in microseconds: "chosen", and of every configuration."""
    problem = Problem.make(cell, bench_mask(cell.mask, cell.seq_len, device), device)
    stof = CONTESTANTS["stof"]
    mask = stof.build(problem)
    with stof.prepare(problem, mask) as call:
        captured = {"chosen": timing.CapturedCall(call)}
    for name, call in configurations(problem, mask):
        captured[name] = timing.CapturedCall(call)
    times = dict(zip(captured, timing.replay_times_us([*captured.values()]), strict=True))
    best = min(times.values())
    return {"cell": asdict(cell), "times_us": times, "regret": times["chosen"] / best}


def main(path: str, *masks: str) -> None:
    device, records = torch.device("cuda"), []
    with torch.no_grad():
        for cell in cells(device, masks or MASKS):
            records.append(measure(cell, device))
            times = {name: round(t, 1) for name, t in records[-1]["times_us"].items()}
            print(cell, times, f"{records[-1]['regret']:.2f}", flush=True)
            torch.cuda.empty_cache()
    Path(path).write_text(json.dumps(records, indent=1) + "\n")
    regrets = [r["regret"] for r in records]
    print(f"geometric mean {geometric_mean(regrets):.3f}, worst {max(regrets):.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
