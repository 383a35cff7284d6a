"""The benchmark: its masks, its honesty about wrong results, and its result files."""

import dataclasses
import json
from contextlib import contextmanager

import pytest
import torch

from stof_hf.bench import attention as bench
from stof_hf.bench import backward, building, contestants, plot, roofline, summary
from stof_hf.bench.contestants import CONTESTANTS, Cell, Contestant, Problem
from stof_hf.bench.masks import MASKS, bench_mask
from stof_hf.errors import MaskError, StofError, UnsupportedError
from stof_hf.kernels import jit

CPU = torch.device("cpu")
KEPT = {
    "full": {128: 100.0, 512: 100.0},
    "causal": {128: 50.4, 512: 50.1, 1024: 50.0, 4096: 50.0},
    "sliding": {128: 38.1, 512: 11.9, 1024: 6.1, 4096: 1.6},
    "longformer": {128: 87.5, 512: 33.7, 1024: 17.9, 4096: 4.7},
    "bigbird": {128: 75.8, 512: 23.8, 1024: 12.3, 4096: 3.1},
    "document": {128: 28.1, 512: 28.8, 1024: 23.5, 4096: 7.1},
}


def tiny(mask="longformer", **changes):
    return dataclasses.replace(Cell(mask, 1, 2, 1, 96, 32, "float32"), **changes)


@pytest.mark.parametrize("name", MASKS)
def test_masks_keep_what_the_committed_results_say(name):
    for seq_len, percent in KEPT[name].items():
        assert round(bench_mask(name, seq_len, CPU).kept_percent(CPU), 1) == percent


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("seq_len", [128, 512])
def test_our_mask_equals_the_mask_function(name, seq_len):
    cell = Cell(name, 1, 1, 1, seq_len, 32, "float32")
    problem = Problem.make(cell, bench_mask(name, seq_len, CPU), CPU)
    ours = CONTESTANTS["stof"].build(problem).to_dense()
    assert torch.equal(ours[0, 0], problem.mask.dense(CPU))


def test_reference_is_sdpa_in_fp64():
    cell = tiny(batch=2, heads=4, kv_heads=2)
    p = Problem.make(cell, bench_mask(cell.mask, cell.seq_len, CPU), CPU)
    k, v = (t.double() for t in p.expanded())
    expected = torch.nn.functional.scaled_dot_product_attention(
        p.q.double(), k, v, attn_mask=p.mask.dense(CPU)
    )
    assert torch.allclose(p.reference().double(), expected, atol=1e-5)


def test_every_cell_is_measured_on_the_cpu():
    cells = [tiny(mask) for mask in MASKS]
    data = bench.run(cells, device=CPU)
    for record in data["cells"]:
        results = record["results"]
        ran = {name for name, result in results.items() if result["status"] == "ok"}
        dense = {"sdpa_flash"} if record["cell"]["mask"] in ("full", "causal") else set()
        assert ran == {"sdpa_mask", "stof"} | dense
        for name in ran:
            assert results[name]["time_us"] > 0
            assert results[name]["max_error"] < 1e-4
        assert results["stof"]["build_ms"] > 0
        assert {r["status"] for n, r in results.items() if n not in ran} == {"unavailable"}


def _contestant(name, call):
    @contextmanager
    def prepare(problem, mask):
        yield lambda: call(problem)

    return Contestant(name, prepare, lambda cell, device: None)


def test_a_wrong_result_gets_no_time(monkeypatch):
    def forgets_the_mask(p):
        k, v = p.expanded()
        return torch.nn.functional.scaled_dot_product_attention(p.q, k, v)

    wrong = _contestant("sdpa_mask", forgets_the_mask)
    nan = _contestant("sdpa_flash", lambda p: p.q * torch.nan)
    monkeypatch.setitem(contestants.CONTESTANTS, "sdpa_mask", wrong)
    monkeypatch.setitem(contestants.CONTESTANTS, "sdpa_flash", nan)
    data = bench.run([tiny()], contestants=["sdpa_mask", "sdpa_flash", "stof"], device=CPU)
    results = data["cells"][0]["results"]
    for name in ("sdpa_mask", "sdpa_flash"):
        assert results[name]["status"] == "wrong"
        assert "time_us" not in results[name]
    assert results["stof"]["status"] == "ok"
    assert not summary.ratios(data)
    assert len(summary.problems(data)) == 2


def test_an_error_is_recorded_and_the_run_goes_on(monkeypatch):
    def raises(problem):
        raise RuntimeError("no kernel for this\nand a long story")

    monkeypatch.setitem(contestants.CONTESTANTS, "sdpa_mask", _contestant("sdpa_mask", raises))
    cells = [tiny(), tiny("sliding")]
    data = bench.run(cells, contestants=["sdpa_mask", "stof"], device=CPU)
    for record in data["cells"]:
        failed = record["results"]["sdpa_mask"]
        assert failed["status"] == "error"
        assert failed["error"].startswith("RuntimeError: no kernel for this (test_bench.py:")
        assert record["results"]["stof"]["status"] == "ok"


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    file = tmp_path / "results" / "attention.json"
    cells = [tiny("sliding"), tiny("causal")]
    bench.run(cells[:1], contestants=["stof"], device=CPU, json_path=file)
    first = json.loads(file.read_text())
    measured = []
    bench.run(
        cells, contestants=["stof", "sdpa_mask"], device=CPU, json_path=file,
        progress=lambda cell, record: measured.append(cell),
    )  # fmt: skip
    second = json.loads(file.read_text())
    assert measured == cells
    assert second["cells"][0]["results"]["stof"] == first["cells"][0]["results"]["stof"]
    bench.run(cells, contestants=["stof"], device=CPU, json_path=file, progress=measured.append)
    assert measured == cells

    monkeypatch.setattr(bench, "source_hash", lambda: "other sources")
    bench.run(cells, contestants=["stof", "sdpa_mask"], device=CPU, json_path=file)
    third = json.loads(file.read_text())
    assert third["sources"] == "other sources"
    for before, after in zip(second["cells"], third["cells"], strict=True):
        assert after["results"]["stof"]["sources"] == "other sources"
        assert after["results"]["sdpa_mask"] == before["results"]["sdpa_mask"]


def test_results_of_another_machine_are_not_mixed(tmp_path):
    file = tmp_path / "attention.json"
    data = bench.run([], device=CPU, json_path=file)
    file.write_text(json.dumps({**data, "device": "another"}))
    with pytest.raises(StofError, match="Name another file"):
        bench.run([tiny()], device=CPU, json_path=file)
    file.write_text("not json")
    with pytest.raises(StofError, match="holds no benchmark results"):
        bench.run([tiny()], device=CPU, json_path=file)


def test_unknown_names():
    with pytest.raises(StofError, match="no contestant is called 'fast'"):
        bench.run([tiny()], contestants=["fast"], device=CPU)
    with pytest.raises(MaskError, match="no mask is called 'dense'"):
        bench_mask("dense", 128, CPU)
    with pytest.raises(MaskError, match="multiple of 32"):
        bench_mask("causal", 100, CPU)


@pytest.fixture
def results():
    def record(mask, seq_len, **times):
        cell = Cell(mask, 1, 12, 12, seq_len, 64, "float16")
        done = {n: {"status": "ok", "time_us": t, "max_error": 1e-3} for n, t in times.items()}
        return {"cell": dataclasses.asdict(cell), "kept_percent": 5.0, "results": done}

    return {
        "format": 1,
        "device": "a GPU",
        "cells": [
            record("longformer", 512, stof=10.0, flex_triton=20.0, flex_triton64=16.0),
            record("longformer", 4096, stof=10.0, flex_triton=80.0, flex_triton64=4.0),
        ],
    }


def text(*tables):
    from rich.console import Console

    console = Console(width=160)
    with console.capture() as captured:
        console.print(*tables)
    return captured.get()


def test_summary_takes_the_best_peer_of_each_cell(results):
    assert [(r, n) for _, r, n in summary.ratios(results)] == [
        (1.6, "flex_triton64"),
        (0.4, "flex_triton64"),
    ]
    shown = text(summary.summary(results))
    # sqrt(1.6 * 0.4), sqrt(2 * 8), and the cell that is slowest against its best peer
    assert "0.80" in shown
    assert "4.00" in shown
    assert "0.40 (flex_triton64, B=1 S=4096)" in shown
    assert "80.0" in text(summary.detail(results))


@pytest.mark.skipif(jit.find_compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", building.PATTERNS)
def test_mask_building_is_measured(name):
    data = building.run([name], [96], device=CPU)
    (record,) = data["cells"]
    assert record["stof"]["mask_ms"] > 0 and record["stof"]["plan_ms"] > 0
    assert name in text(building.table(data))


def test_plot_is_saved(results, tmp_path):
    plot.plot(results, tmp_path / "pictures" / "attention.png")
    assert (tmp_path / "pictures" / "attention.png").read_bytes()[1:4] == b"PNG"


def test_roofline_is_drawn(results, tmp_path, monkeypatch):
    picture = tmp_path / "pictures" / "roofline.png"
    with pytest.raises(UnsupportedError, match="roofs of"):
        roofline.roofline(results, picture)
    monkeypatch.setitem(roofline.ROOFS, results["device"], (1e12, 1e11))
    reach = roofline.roofline(results, picture)
    assert picture.read_bytes()[1:4] == b"PNG"
    # 5 % of 4096 x 4096 pairs in 10 us; memory is the lower roof: 64 KB a row and head.
    flop, size = 4 * 12 * 64 * 0.05 * 4096**2, 4 * 12 * 4096 * 64 * 2
    assert reach == {"longformer": pytest.approx(flop / 10e-6 / min(1e12, 1e11 * flop / size))}


@pytest.mark.parametrize("name", backward.MASKS)
def test_gradients_are_measured(name, tmp_path):
    file = tmp_path / "backward.json"
    sizes = {"seq_len": [96], "heads": 4, "kv_heads": 2, "head_dim": 32}
    cells = backward.cells(CPU, [name], **sizes)
    data = backward.run(cells, device=CPU, json_path=file)
    assert json.loads(file.read_text()) == data
    results = data["cells"][0]["results"]
    ran = {n for n, r in results.items() if r["status"] == "ok"}
    assert ran == {"sdpa_mask", "stof"} | ({"sdpa_flash"} if name == "causal" else set())
    assert all(results[n]["time_us"] > 0 and results[n]["rel_error"] < 1e-5 for n in ran)
    assert name in text(backward.table(data))


def test_wrong_gradients_get_no_time(monkeypatch):
    wrong = _contestant("sdpa_mask", lambda p: p.q + 0 * p.k + 0 * p.v)
    monkeypatch.setitem(backward.CONTESTANTS, "sdpa_mask", wrong)
    cells = backward.cells(CPU, ["causal"], seq_len=[96], heads=2, head_dim=32)
    data = backward.run(cells, contestants=["sdpa_mask", "stof"], device=CPU)
    found = data["cells"][0]["results"]
    assert found["sdpa_mask"]["status"] == "wrong" and "time_us" not in found["sdpa_mask"]
    assert found["stof"]["status"] == "ok"
    with pytest.raises(StofError, match="no contestant is called 'fast'"):
        backward.run(cells, contestants=["fast"], device=CPU)
