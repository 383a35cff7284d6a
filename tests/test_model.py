"""The analytical model against what was measured on an H200."""

import json
from pathlib import Path
from statistics import geometric_mean

import pytest
import torch

from stof_hf import SparseMask, patterns
from stof_hf.attention import model, select
from stof_hf.attention.cuda_band import band_of
from stof_hf.bench.contestants import CONTESTANTS, Cell, Problem
from stof_hf.bench.masks import bench_mask

RESULTS = Path(__file__).parents[1] / "benchmarks/results/nvidia-h200/regret.json"
CPU = torch.device("cpu")


def test_the_model_chooses_about_the_best_of_what_was_measured(monkeypatch):
    monkeypatch.setattr(select, "multiprocessors", lambda device: 132)
    regrets, masks = [], {}
    for record in json.loads(RESULTS.read_text()):
        cell = Cell(**record["cell"])
        if cell.seq_len > 4096:  # the masks of longer ones take long to build on a CPU
            continue
        key = cell.mask, cell.seq_len
        if key not in masks:
            problem = Problem(cell, bench_mask(*key, CPU), *[torch.empty(0)] * 3)
            masks[key] = CONTESTANTS["stof"].build(problem)
        times = {n: t for n, t in record["times_us"].items() if n != "chosen"}

        q, k = (
            torch.empty(cell.batch, heads, cell.seq_len, cell.head_dim, device="meta").half()
            for heads in (cell.heads, cell.kv_heads)
        )
        band = band_of(masks[key].pattern)

        def predicted(name, cell=cell, mask=masks[key], q=q, k=k, band=band):
            if name == "cudnn":
                ahead = select.cudnn_is_ahead(q, k, mask, cell.mask == "causal", band)
                return 0.0 if ahead else float("inf")
            if name.startswith("band"):
                form = model.BandForm(*map(int, name.split()[1:]))
                return select._band_us(form, q, k, mask, band)
            return model.launch_us(name, mask, cell.batch * cell.heads, cell.head_dim, 2, 132)

        regrets.append(times[min(times, key=predicted)] / min(times.values()))
    assert len(regrets) > 100
    assert geometric_mean(regrets) <= 1.05 and max(regrets) <= 1.25


def test_cudnn_computes_long_launches_without_a_mask(monkeypatch):
    monkeypatch.setattr(select, "multiprocessors", lambda device: 132)

    def ahead(batch, length, dim=64, causal=False):
        q = torch.empty(batch, 12, length, dim, dtype=torch.float16, device="meta")
        mask = SparseMask.from_pattern(patterns.Causal() if causal else patterns.Full(), length)
        return select.cudnn_is_ahead(q, q, mask, causal)

    assert not ahead(1, 128) and not ahead(8, 128)
    assert ahead(1, 4096) and ahead(16, 2048) and ahead(16, 2048, 128)
    assert not ahead(8, 2048, causal=True) and ahead(16, 4096, causal=True)


@pytest.mark.parametrize("name", ["rows", "paired", "heads", "triton"])
def test_more_work_takes_longer(name):
    masks = [
        SparseMask.from_pattern(p, 1024)
        for p in (patterns.SlidingWindow(64, 0), patterns.Causal(), patterns.Full())
    ]
    times = [[model.launch_us(name, m, n, 128, 2, 132) for m in masks] for n in (8, 64, 512)]
    assert all(a <= b for row in times for a, b in zip(row, row[1:], strict=False))
    assert all(
        a < b
        for column in zip(*times, strict=True)
        for a, b in zip(column, column[1:], strict=False)
    )


def test_memory_bounds_a_launch_from_below():
    mask = SparseMask.from_pattern(patterns.SlidingWindow(16, 0), 4096)
    moved = 4 * 4096 * 64 * 2 * 10_000
    assert model.launch_us("rows", mask, 10_000, 64, 2, 132) >= moved / 4.3e6
