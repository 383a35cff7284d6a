"""`stof bench search`: its peers on invented times, and all of it on models of a CPU's size."""

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from layers import build
from small_zoo import SMALL, shrink, tokens
from typer.testing import CliRunner

from stof_hf import StofError, cli
from stof_hf.bench import apart, fresh, search, search_peers, search_turns, timing, zoo
from stof_hf.fusion.fused import Choice
from stof_hf.fusion.install import find, replaced
from stof_hf.fusion.layer_ops import Scheme
from stof_hf.tuning import cache
from stof_hf.tuning.inputs import make_inputs, run
from stof_hf.tuning.measure import Clock, Recorded, replaying
from stof_hf.tuning.sample import capture

CPU = torch.device("cpu")


class Invented(dict):
    """Times of everything, made of the keys."""

    def __missing__(self, key):
        return 10.0 + int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 2**32


def samples_of(name, length=32):
    model = build(name)
    with torch.no_grad():
        called = run(model, make_inputs(model, 1, length, "forward", 0), "forward")
        return capture(model, find(model), *called)


@pytest.fixture(scope="module")
def bert():
    samples = samples_of("bert")
    return {"layer": samples[min(samples, key=lambda k: "Embeddings" in k)],
            "embeddings": samples[max(samples, key=lambda k: "Embeddings" in k)]}  # fmt: skip


def time_of(sample, choice, times):
    """Of a choice's segments together."""
    scheme = Scheme.decode(sample.layer.names, choice.scheme)
    return sum(
        times[sample.key(bounds, name, params)]
        for bounds, (name, params) in zip(scheme.bounds, choice.segments, strict=True)
    )


def exhaust(sample, measurer, budget_s=60, save=lambda: None):
    return search_peers.exhaustive_search(sample, measurer, budget_s, save)


def test_exhaustive_search_finds_the_best_there_is(bert):
    sample, times = bert["embeddings"], Invented()
    measurer = search_peers.Borrowed(Recorded(times))
    choice, keys = exhaust(sample, measurer)
    assert keys == measurer.times.keys() and len(keys) > 50
    # By hand: the norm with the table, or behind it.
    least = dict.fromkeys(((0, 2), (0, 1), (1, 2)), math.inf)
    for key, taken in measurer.times.items():
        bounds = (0 if "embed[" in key else 1, 2 if "norm[" in key else 1)
        least[bounds] = min(taken, least[bounds])
    assert time_of(sample, choice, times) == min(least[0, 2], least[0, 1] + least[1, 2])


def test_groups_of_tiles_that_repeat_others_are_left_out(bert):
    measurer = search_peers.Borrowed(Recorded(Invented()))
    exhaust(bert["layer"], measurer)
    seen = {}
    for key in measurer.times:
        if key.startswith("gemm("):
            values = dict(pair.split("=") for pair in key[5 : key.index(")")].split(","))
            seen.setdefault(values["block_m"], set()).add(values["group_m"])
    # 32 rows are two tiles of 16, else one.
    assert seen == {"16": {"1", "4"}} | dict.fromkeys(("32", "64", "128", "256"), {"1"})


@pytest.mark.parametrize("seed", range(3))
def test_random_search_takes_as_many_measurements_as_it_may(bert, seed):
    times, measurer = Invented(), search_peers.Borrowed(Recorded(Invented()))
    choice = search_peers.random_search(bert["layer"], measurer, 60, seed)
    assert len(measurer.times) == 60
    # What it measured, put together in the best way, is not worse than any scheme of it.
    search_ = search_peers._search(bert["layer"], measurer, 60, 0)
    for one in search_peers._candidates(search_peers._space(search_)):
        if bert["layer"].key(*one) in measurer.times:
            search_.measure(*one)
    assert time_of(bert["layer"], choice, times) == min(map(search_.cost, search_.schemes()))
    best, *_ = exhaust(bert["layer"], search_peers.Borrowed(Recorded(times)))
    assert time_of(bert["layer"], best, times) < time_of(bert["layer"], choice, times)


def test_random_searches_differ(bert):
    keys = []
    for seed in (0, 1, 1):
        measurer = search_peers.Borrowed(Recorded(Invented()))
        search_peers.random_search(bert["layer"], measurer, 40, seed)
        keys.append(set(measurer.times))
    assert keys[0] != keys[1] == keys[2]


def test_random_search_ends_where_there_is_nothing_left(bert):
    measurer = search_peers.Borrowed(Recorded(Invented()))
    search_peers.random_search(bert["embeddings"], measurer, 10**6, 0)
    assert len(measurer.times) == len(exhaust(bert["embeddings"], measurer)[1])


def test_too_few_measurements_find_nothing(bert):
    measurer = search_peers.Borrowed(Recorded(Invented()))
    assert search_peers.random_search(bert["layer"], measurer, 1, 0) is None
    assert len(measurer.times) == 1


def test_nothing_is_measured_twice(bert):
    class Counted(Recorded):
        asked = 0

        def _time(self, key, make):
            self.asked += 1
            return super()._time(key, make)

    shared = Counted(Invented())
    for seed in range(2):
        measurer = search_peers.Borrowed(shared)
        search_peers.random_search(bert["layer"], measurer, 50, seed)
        assert len(measurer.times) == 50
    assert shared.asked == len(shared.times) < 100


def test_an_exhaustive_search_goes_on_where_it_stopped(bert, monkeypatch):
    monkeypatch.setattr(search_peers, "_SAVED", 8)
    shared, saved = Recorded(Invented()), []
    measurer = search_peers.Borrowed(shared)

    def save():
        saved.append(len(measurer.times))
        if len(saved) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exhaust(bert["embeddings"], measurer, save=save)
    assert saved == [8, 16]
    again = search_peers.Borrowed(Recorded(Invented()))
    again.times |= measurer.times
    _, keys = exhaust(bert["embeddings"], again)
    assert keys == again.times.keys() and len(again.measurer.times) == len(keys) - 16
    late = search_peers.Borrowed(shared)
    assert exhaust(bert["embeddings"], late, budget_s=0) == (None, keys) and not late.times


def test_what_is_known_is_not_compiled_again(bert):
    class Prepared(Recorded):
        def __init__(self):
            super().__init__(Invented())
            self.prepared = []

        def prepare(self, candidates):
            self.prepared += candidates

    shared = Prepared()
    measurer = search_peers.Borrowed(shared)
    exhaust(bert["embeddings"], measurer)
    assert sorted(shared.prepared) == sorted(measurer.times)
    measurer.prepare(dict.fromkeys(measurer.times))
    assert sorted(shared.prepared) == sorted(measurer.times)


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "folder", lambda: tmp_path / "tuning")
    shrink(monkeypatch)


@pytest.mark.parametrize("name", SMALL)
def test_a_search_and_its_peers(name, small, tmp_path):
    cell, path = zoo.Cell(name, 1, tokens(name)), tmp_path / "new" / "times.json"
    with replaying(Clock()) as measurer:
        record = fresh.search(
            cell, CPU, budget_s=2, seeds=2, exhaustive_s=60, times_path=path
        )  # fmt: skip
    names = ["own", "searched", "random 0", "random 1", "exhaustive"]
    assert [list(kind["times_us"]) for kind in record["kinds"]] == [names] * len(record["kinds"])
    assert search.covered(record) == 1
    kept = json.loads(path.read_text())["times"]
    assert len(kept) == record["exhaustive"]["candidates"] and kept.keys() <= measurer.times.keys()
    layers = record["search"]["layers"]
    assert [kind["kind"] for kind in record["kinds"]] == [layer["kind"] for layer in layers]
    # Whole layers count among a report's measurements, and not among the search's.
    counted = sum(kind["measurements"] for kind in record["kinds"])
    assert counted == record["search"]["measurements"] - len(layers)
    assert json.loads(json.dumps(record)) and search.ratios(record).keys() == {
        "own", "random", "median random", "exhaustive"
    }  # fmt: skip


def test_times_of_another_environment_are_measured_again(small, tmp_path):
    cell, path = zoo.Cell("gpt", 1, 96), tmp_path / "times.json"
    path.write_text(json.dumps({"of": "another", "times": {"x": 1.0}}))
    with replaying(Clock()):
        fresh.search(cell, CPU, budget_s=1, seeds=0, exhaustive_s=60, times_path=path)
    kept = json.loads(path.read_text())
    assert "x" not in kept["times"] and kept["of"] != "another"
    path.write_text(json.dumps({**kept, "times": {**kept["times"], "x": None}}))
    with replaying(Clock()):
        record = fresh.search(cell, CPU, budget_s=1, seeds=0, exhaustive_s=1e-3, times_path=path)
    assert search.covered(record) == 1 and "random" not in search.ratios(record)


def test_a_choice_that_fails_has_no_time(bert, monkeypatch):
    monkeypatch.setattr(timing, "_TURN_S", 0.001)
    choices = {
        "own": None,
        "searched": Choice.unfused(bert["layer"].layer),
        "random 0": Choice("0", ()),
    }
    with torch.no_grad():
        times = search_turns._times_us(bert["layer"], choices)
    assert list(times) == ["own", "searched"] and min(times.values()) > 0


def test_a_hit_installs_what_was_tuned(small, monkeypatch):
    cell = zoo.Cell("bert_base", 1, 96)
    with pytest.raises(StofError, match="nothing is tuned"):
        fresh.first_forwards(cell, CPU, tuned=True)
    assert fresh.first_forwards(cell, CPU, tuned=False)["apply_s"] < 0.01
    made, build_model = [], zoo.Problem.sparse_model
    monkeypatch.setattr(
        zoo.Problem, "sparse_model", lambda *args: made.append(build_model(*args)) or made[-1]
    )
    with replaying(Recorded(_Fused())):
        record = fresh.search(cell, CPU, budget_s=5, seeds=0)
    assert all(layer["kept"] for layer in record["search"]["layers"])
    assert not list(replaced(made[0])), "peers look at the model as it was"
    hit = fresh.first_forwards(cell, CPU, tuned=True)
    assert hit["forwards_s"] > 0 and len(list(replaced(made[1]))) == 3


@pytest.mark.gpu
def test_a_search_and_its_peers_on_a_gpu(small, tmp_path):
    cell, cuda = zoo.Cell("bert_base", 1, 96), torch.device("cuda")
    record = fresh.search(
        cell, cuda, budget_s=5, seeds=1, exhaustive_s=10, times_path=tmp_path / "times.json"
    )  # fmt: skip
    names = {"own", "searched", "random 0", "exhaustive"}
    assert all(kind["times_us"].keys() == names for kind in record["kinds"])
    assert 0 < search.covered(record) < 1 < search.ratios(record)["own"]
    assert fresh.first_forwards(cell, cuda, tuned=True)["forwards_s"] > 0


class _Fused(dict):
    """Templates do not run, PyTorch's kernels together beat the layer's own code."""

    def __missing__(self, key):
        if key.startswith(("torch(", "attention(")):
            return 1.0
        return 1000.0 if "own code" in key else 10.0 if key.startswith("Bert") else None


def test_new_processes_import_the_tuner_when_it_is_called():
    script = "import sys, stof_hf.bench.fresh, stof_hf.bench.apart; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    loaded = done.stdout.split()
    assert "stof_hf.bench.fresh" in loaded
    assert not [name for name in loaded if name.startswith(("stof_hf.tuning", "stof_hf.fusion"))]


def test_new_caches_keep_the_kernels(monkeypatch, tmp_path):
    monkeypatch.setenv("STOF_CACHE_DIR", str(tmp_path))
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "built").touch()
    (tmp_path / "tuning").mkdir()
    with search.new_caches() as environ:
        folder = Path(environ["STOF_CACHE_DIR"])
        assert [path.name for path in folder.iterdir()] == ["kernels"]
        assert (folder / "kernels" / "built").exists()
        assert Path(environ["TRITON_CACHE_DIR"]).parent == folder
    assert not folder.exists() and (tmp_path / "kernels" / "built").exists()


def test_a_new_process_has_its_variables():
    assert apart.alone(os.getenv, "STOF_TOLD", environ={"STOF_TOLD": "yes"}) == "yes"
    assert "STOF_TOLD" not in os.environ


def record_of(**changed):
    found = {"budget_s": 15, "seconds": 3.5, "measurements": 9}
    record = {"cell": {"model": "gpt", "batch": 1, "tokens": 128}, "seeds": 2, "search": found,
              "sources": "now", "hit": {"seconds": 0.5}, "kinds": [
                  {"count": 2, "times_us": {"own": 30.0, "searched": 10.0, "random 0": 11.0,
                                            "random 1": 15.0, "exhaustive": 9.0}},
                  {"count": 1, "times_us": {"own": 8.0, "searched": 5.0, "random 0": 5.0,
                                            "random 1": 9.0, "exhaustive": 5.0}},
              ], "exhaustive": {"measured": 3, "candidates": 4}}  # fmt: skip
    return record | changed


def test_ratios():
    record = record_of()
    assert search.layers_us(record)["searched"] == 25
    assert search.ratios(record) == {
        "own": 68 / 25, "random": 27 / 25, "median random": 33 / 25, "exhaustive": 23 / 25
    }  # fmt: skip
    del record["kinds"][1]["times_us"]["random 1"]
    assert search.ratios(record)["median random"] == 27 / 25
    del record["kinds"][1]["times_us"]["searched"]
    assert search.ratios(record) == {}
    assert search.table({"cells": [record, record_of()]}).row_count == 2


def test_results_are_completed(monkeypatch, tmp_path):
    measured = []

    def measure(cell, device, *, budget_s, seeds, exhaustive_s, times_path):
        measured.append((cell, exhaustive_s, times_path and times_path.name))
        share = {"exhaustive": {"measured": len(measured), "candidates": 3}} if exhaustive_s else {}
        fields = record_of(seeds=seeds) | {"exhaustive": None} | share
        fields["search"] = {**fields["search"], "budget_s": budget_s}
        return {k: v for k, v in fields.items() if k not in ("cell", "sources")}

    monkeypatch.setattr(search, "_measure", measure)
    gpt, vit = zoo.Cell("gpt", 1, 128), zoo.Cell("vit_base", 1, 65)
    path, shown = tmp_path / "search.json", []

    def again(cells=(gpt,), **options):
        options = {"budget_s": 15, "seeds": 2, **options}
        measured.clear()
        return search.run(
            cells, lambda cell, record: shown.append(cell), device=CPU, json_path=path, **options
        )

    again()
    assert measured == [(gpt, 0, None)]
    data = again([gpt, vit])
    assert [cell for cell, *_ in measured] == [vit] and shown == [gpt, gpt, vit]
    assert [record["cell"]["model"] for record in data["cells"]] == ["gpt", "vit_base"]
    again(seeds=1)
    assert not measured
    again(seeds=3)
    again(budget_s=10, seeds=3)
    assert measured
    options = {"budget_s": 10, "seeds": 3, "exhaustive": [gpt], "exhaustive_s": 7}
    again(**options)
    assert measured == [(gpt, 7, "search.gpt-1x128.times.json")]
    # A third of its candidates: it goes on, until all are there.
    monkeypatch.setattr(search, "_measure", lambda *args, **kwargs: {
        **measure(*args, **kwargs), "exhaustive": {"measured": 3, "candidates": 3}
    })  # fmt: skip
    again(**options)
    assert measured
    again(**options)
    assert not measured
    other = type("Environment", (), {"sources": "changed"})
    monkeypatch.setattr(search.tuned, "environment", lambda device: other)
    again(**options)
    assert measured
    assert len(json.loads(path.read_text())["cells"]) == 2


def test_the_command(monkeypatch, tmp_path):
    record = record_of()
    cell, seen = zoo.Cell(**record["cell"]), {}

    def run(cells, progress, **options):
        seen.update(options, cells=cells)
        progress(cell, record)
        return {"cells": [record]}

    monkeypatch.setattr(search, "run", run)
    ask = ["bench", "search", "--device", "cpu", "--models", "gpt", "--batch", "1,8"]
    done = CliRunner().invoke(cli.app, [*ask, "--exhaustive", "gpt:1x128"])
    assert done.exit_code == 0, done.output
    assert seen["cells"] == [cell, zoo.Cell("gpt", 8, 512)] and seen["exhaustive"] == [cell]
    assert (seen["budget_s"], seen["seeds"]) == (15, 3)
    assert "not complete, 75.0% of its candidates" in done.output and "1.080" in done.output
    for text, message in (("gpt:16x2048", "is not among"), ("gpt", "is no cell")):
        done = CliRunner().invoke(cli.app, [*ask, "--exhaustive", text])
        assert isinstance(done.exception, StofError) and message in str(done.exception)


def test_all_of_it_in_new_processes(tmp_path):
    seen, cell = [], zoo.Cell("vit_base", 1, 17)
    data = search.run(
        [cell], lambda cell, record: seen.append(record), device=CPU, budget_s=1, seeds=1,
        json_path=tmp_path / "search.json",
    )  # fmt: skip
    (record,) = data["cells"]
    assert seen == [record] and search.table(data).row_count == 1
    assert record["search"]["measurements"] > 10 and record["hit"]["apply_s"] > 0
    assert "random" in search.ratios(record)
