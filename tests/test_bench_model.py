"""`stof bench model` on models that are small enough for a CPU."""

import contextlib
import json
import pickle
import sys
import threading
import types
from collections import Counter
from dataclasses import asdict

import pytest
import torch
import transformers
from small_zoo import SMALL, shrink, tokens

from stof_hf import StofError
from stof_hf.bench import apart, model, turns, zoo
from stof_hf.bench.ceiling import ceiling_ms, products

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shrink(monkeypatch)


@pytest.mark.parametrize("name", SMALL)
def test_all_apply_the_same_mask(name):
    names = ["eager", "sdpa", "stof", *(["default_sdpa"] if name == "bert_base" else [])]
    cell = zoo.Cell(name, 2, tokens(name))
    data = model.run([cell], contestants=names, device=CPU)
    results = data["cells"][0]["results"]
    assert {n: r["status"] for n, r in results.items()} == dict.fromkeys(names, "ok"), results
    assert data["cells"][0]["ceiling_ms"] > 0
    assert all(r["time_ms"] > 0 and r["error"] < 1e-5 for r in results.values())


def test_a_mask_that_is_not_applied_is_noticed(monkeypatch):
    monkeypatch.setattr(zoo.Problem, "pattern", lambda self: None)
    data = model.run([zoo.Cell("bert_base", 1, 96)], contestants=["stof"], device=CPU)
    assert data["cells"][0]["results"]["stof"]["status"] == "wrong"


def test_products_are_those_of_the_layers():
    sizes = {}
    for name in SMALL:
        problem = zoo.Problem(name, 2, tokens(name), torch.float32, CPU)
        net = problem.model("sdpa")
        sizes[name] = products(net, lambda net=net, given=problem.inputs: net(**given))
    rows = 2 * 96
    # The pooler sees one token of each.
    assert sizes["bert_base"] == {
        (rows, 64, 64): 8,
        (rows, 96, 64): 2,
        (rows, 64, 96): 2,
        (2, 64, 64): 1,
    }
    assert sizes["gpt"] == {
        (rows, 192, 64): 2,
        (rows, 64, 64): 2,
        (rows, 256, 64): 2,
        (rows, 64, 256): 2,
    }
    assert sizes["t5"] == {(rows, 64, 64): 24, (rows, 96, 64): 4, (rows, 64, 96): 4}
    assert sizes["vit_base"][2 * 64, 64, 3 * 16 * 16] == 1
    one = next(iter(sizes["gpt"]))
    assert ceiling_ms(Counter({one: 3}), torch.float32, CPU) > 0


def test_models_do_not_change_each_other():
    problem = zoo.Problem("bert_base", 1, 96, torch.float32, CPU)
    models = {name: problem.model(name) for name in ("eager", "sdpa", "stof")}
    for name, one in models.items():
        assert one.config._attn_implementation == name


def test_liger_changes_its_own_model_only(monkeypatch):
    llama = transformers.models.llama.modeling_llama
    own, seen = llama.apply_rotary_pos_emb, []

    def rotate(*args, **kwargs):
        seen.append(1)
        return own(*args, **kwargs)

    def apply(fused_linear_cross_entropy, model):
        llama.apply_rotary_pos_emb = rotate

    package = types.SimpleNamespace(apply_liger_kernel_to_llama=apply)
    monkeypatch.setitem(sys.modules, "liger_kernel", types.SimpleNamespace(transformers=package))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    cell = zoo.Cell("llama_base", 1, 96)
    data = model.run([cell], contestants=["liger", "sdpa"], device=CPU)
    results = data["cells"][0]["results"]
    assert {n: r["status"] for n, r in results.items()} == {"liger": "ok", "sdpa": "ok"}
    assert llama.apply_rotary_pos_emb is own and seen
    seen.clear()
    model.run([cell], contestants=["sdpa"], device=CPU)
    assert not seen


def test_flex_attention_is_for_models_that_take_it():
    takes = {name: model.CONTESTANTS["default_flex"].takes(name) for name in SMALL}
    assert takes["bert_base"] and takes["llama_base"] and not takes["vit_base"]


def test_an_error_reaches_another_process():
    class Unsendable(Exception):
        def __reduce__(self):
            raise TypeError("cannot be sent")

    def fail(cell):
        raise Unsendable(f"of a compiler for {cell}")

    with pytest.raises(StofError, match="of a compiler for bert") as caught:
        apart.told(fail, cell="bert")
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args


def test_results_are_completed(tmp_path, monkeypatch):
    path, cell = tmp_path / "model.json", zoo.Cell("bert_base", 1, 96)
    model.run([cell], contestants=["eager", "stof"], device=CPU, json_path=path)
    first = json.loads(path.read_text())["cells"][0]["results"]
    other = types.SimpleNamespace(sources="another")
    monkeypatch.setattr(model.tuned, "environment", lambda device: other)
    model.run([cell], contestants=["eager", "sdpa", "stof"], device=CPU, json_path=path)
    then = json.loads(path.read_text())["cells"][0]["results"]
    # The fastest peers run again beside ours.
    assert set(then) == {"eager", "sdpa", "stof"} == {*then["stof"]["peers_ms"], "stof"}
    assert then["eager"]["time_ms"] == then["stof"]["peers_ms"]["eager"]
    model.run([cell], contestants=["eager", "sdpa", "stof"], device=CPU, json_path=path)
    assert json.loads(path.read_text())["cells"][0]["results"] == then
    assert first["stof"]["peers_ms"] == {n: first[n]["time_ms"] for n in ("eager", "sdpa")}
    assert then["stof"]["sources"] == "another" != first["stof"]["sources"]
    with pytest.raises(StofError, match="no contestant is called 'slow'"):
        model.run([cell], contestants=["slow"], device=CPU)


def test_what_there_is_no_time_for_is_left_for_the_next_run(tmp_path):
    path, cell = tmp_path / "model.json", zoo.Cell("bert_base", 1, 96)
    for prepare_s, there in ((0, set()), (60, {"eager", "sdpa"})):
        data = model.run(
            [cell], contestants=["eager", "sdpa"], device=CPU, prepare_s=prepare_s, json_path=path
        )
        assert set(data["cells"][0]["results"]) == there


def test_the_best_peer_may_have_run_in_another_process():
    ours = {"time_ms": 2.0, "status": "ok", "peers_ms": {"sdpa": 6.0, "eager": 9.0}}
    results = {"tuned": ours, "eager": {"time_ms": 5.0}, "sdpa": {"time_ms": 5.5}}
    for later, ratio in (({}, "3.00"), ({"max-autotune_sdpa": {"time_ms": 3.0}}, "1.50")):
        record = {"cell": asdict(zoo.Cell("gpt", 1, 128)), "results": {**results, **later}}
        assert [*model.table({"cells": [record]}).columns[-1].cells] == [ratio]


def test_a_contestant_that_fails_is_told_of(monkeypatch):
    def fail(self, *args, **kwargs):
        raise ValueError("not today")

    monkeypatch.setattr(zoo.Problem, "pattern", fail)
    data = model.run([zoo.Cell("bert_base", 1, 96)], contestants=["sdpa", "stof"], device=CPU)
    results = data["cells"][0]["results"]
    assert results["stof"]["status"] == "error" and "not today" in results["stof"]["error"]
    assert results["sdpa"]["status"] == "ok" and model.table(data).row_count == 1


def test_each_cell_runs_in_a_process_of_its_own(tmp_path):
    seen = []
    data = model.run_apart(
        [zoo.Cell("vit_base", 1, 17)], CPU, lambda cell, record: seen.append(cell),
        contestants=["sdpa"], json_path=tmp_path / "model.json",
    )  # fmt: skip
    assert data["cells"][0]["results"]["sdpa"]["status"] == "ok" and len(seen) == 1


def test_processes_fill_one_table(tmp_path):
    path, seen = tmp_path / "model.json", []
    cells = [zoo.Cell("vit_base", batch, 17) for batch in (1, 2)]
    data = model.run_apart(
        cells, CPU, lambda cell, record: seen.append(cell), jobs=2, contestants=["sdpa"],
        json_path=path,
    )  # fmt: skip
    assert [zoo.Cell(**record["cell"]) for record in data["cells"]] == cells
    assert sorted(seen, key=lambda cell: cell.batch) == cells
    kept = {record["cell"]["batch"]: record for record in json.loads(path.read_text())["cells"]}
    assert kept == {record["cell"]["batch"]: record for record in data["cells"]}


def test_torch_compile_times_candidates_in_turns(monkeypatch):
    from torch._inductor.runtime.benchmarking import benchmarker

    taken = []

    @contextlib.contextmanager
    def turn(device):
        taken.append(device)
        yield

    monkeypatch.setattr(turns, "turn", turn)
    monkeypatch.setattr(benchmarker, "benchmark_gpu", lambda call, rep, **_: call() + rep)
    turns.autotune_in_turn.__wrapped__(CPU)
    assert benchmarker.benchmark(lambda: 1, device="cuda", rep=2) == 3 and taken == [CPU]


def test_turns_may_be_nested(tmp_path):
    with turns.file_lock(tmp_path / "x"), turns.file_lock(tmp_path / "x"), turns.turn(CPU):
        pass


def test_what_is_measured_waits_for_what_is_prepared(tmp_path, monkeypatch):
    monkeypatch.setattr(turns.tempfile, "gettempdir", lambda: str(tmp_path))
    course = []

    def measure():
        with turns.measuring(), turns.measuring():
            course.append("measured")

    waiting = threading.Thread(target=measure)
    with turns.preparing(), turns.preparing():
        waiting.start()
        waiting.join(0.2)
        course.append("prepared")
    waiting.join()
    assert course == ["prepared", "measured"]


def test_the_grid():
    cells = zoo.cells()
    assert len(cells) == 18
    with pytest.raises(StofError, match="no model is called 'bart'; there are bert_base"):
        zoo.cells(["bart"])
    assert zoo.Cell("vit_base", 8, 1025) in cells and zoo.Cell("t5", 16, 2048) in cells
    sizes = {name: zoo.ZOO[name].config(2048) for name in ("bert_large", "llama_base")}
    assert all(isinstance(c, transformers.PreTrainedConfig) for c in sizes.values())
