"""tune, apply_tuned and restore: on the CPU for real, and with recorded times as on a GPU."""

import dataclasses
import hashlib
import importlib
import json
import math
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import transformers
from layers import build, first, inputs_of, interpreted

import stof_hf
from stof_hf.errors import StofError, StofWarning, UnsupportedError
from stof_hf.fusion.install import find, replaced
from stof_hf.fusion.layer_ops import SEGMENTS, Scheme, schemes
from stof_hf.tuning import cache, measure, search
from stof_hf.tuning.measure import Recorded, replaying

tuning = importlib.import_module("stof_hf.tuning.tune")
NAMES = ["bert", "llama", "gpt2", "vit", "modernbert"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "folder", lambda: tmp_path / "tuning")


class Invented(dict):
    """Times of everything, made of the keys: PyTorch is slow, and templates vary."""

    def __missing__(self, key):
        share = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 2**32
        slow = "own code" in key or key.startswith("torch(")
        return (100.0 if slow else 20.0) * (1 + share)


def sizes(name):
    return {} if name == "vit" else {"batch_size": 2, "seq_len": 33}


@pytest.fixture
def invented():
    with replaying(Recorded(Invented())) as measurer:
        yield measurer


@pytest.mark.parametrize("name", NAMES)
def test_tune_on_the_cpu(name):
    model = build(name)
    inputs = inputs_of(model)
    want = first(model, inputs)
    report = stof_hf.tune(model, **sizes(name), budget_s=5, progress=False)
    assert report.layers and not report.skipped and not report.interrupted
    assert sum(layer.count for layer in report.layers) == len(find(model))
    assert report.installed == sum(layer.count for layer in report.layers if layer.kept)
    assert all(segment.template in ("torch", "attention")
               for layer in report.layers for segment in layer.segments)  # fmt: skip
    torch.testing.assert_close(first(model, inputs), want)
    stof_hf.restore(model)
    stof_hf.restore(model)
    assert torch.equal(first(model, inputs), want)


@interpreted
@pytest.mark.parametrize("name", NAMES)
def test_a_search_on_recorded_times_installs_templates(name, invented):
    """Whose times are a GPU's, so that Triton's interpreter computes what is chosen."""
    model = build(name)
    inputs = inputs_of(model, 20)
    want = first(model, inputs)
    report = stof_hf.tune(model, **sizes(name), budget_s=20, progress=False)
    assert report.installed == len(find(model))
    used = {segment.template for layer in report.layers for segment in layer.segments}
    assert used & {"gemm", "gemm_norm", "norm"}
    assert ("embed" in used) == (name in ("bert", "modernbert"))
    torch.testing.assert_close(first(model, inputs), want, rtol=2e-4, atol=2e-4)
    again = build(name)
    found = stof_hf.apply_tuned(again, strict=True)
    assert found.installed == report.installed and found.measurements == 0
    torch.testing.assert_close(first(again, inputs), want, rtol=2e-4, atol=2e-4)


def test_nothing_is_measured_twice(invented):
    model = build("bert")
    first_report = stof_hf.tune(model, seq_len=32, budget_s=20, progress=False)
    assert first_report.measurements == len(invented.times) > 40
    again = stof_hf.tune(model, seq_len=32, budget_s=20, progress=False)
    assert again.measurements == 0
    assert again.layers[0].segments == first_report.layers[0].segments


def test_a_recording_gives_the_same_result():
    with replaying(Recorded(Invented())):
        report = stof_hf.tune(build("gpt2"), seq_len=32, budget_s=60, progress=False, seed=3)
    timings = json.loads(json.dumps(report.to_json()))["timings"]
    with replaying(Recorded(timings)):
        again = stof_hf.tune(build("gpt2"), seq_len=32, budget_s=60, progress=False, seed=3)
    assert again.layers == report.layers
    with replaying(Recorded(timings)), pytest.raises(StofError, match="could not be timed"):
        stof_hf.tune(build("gpt2"), seq_len=48, budget_s=60, progress=False)


@pytest.fixture
def sample(invented):
    from stof_hf.tuning.inputs import make_inputs, run
    from stof_hf.tuning.sample import capture

    model = build("bert")
    call, last = run(model, make_inputs(model, 1, 32, "forward", 0), "forward")
    with torch.no_grad():
        sample, *_ = capture(model, find(model), call, last).values()
    return sample


@pytest.mark.parametrize("seed", range(3))
def test_the_search_is_near_the_best_there_is(sample, invented, seed):
    """Borders: of all schemes with the parameters that were measured, the best is found."""
    made = search.Search(sample, invented, 60, seed, lambda *_: None)
    result = made.run()
    assert result.time_us == pytest.approx(made.cost(result.scheme))
    made.explore(schemes(sample.layer.names))
    least = min(map(made.cost, schemes(sample.layer.names)))
    assert result.time_us <= 1.03 * least
    assert [time for _, time in result.course] == sorted(
        (time for _, time in result.course), reverse=True
    )
    assert result.scheme.legal and result.course[-1][1] == pytest.approx(result.time_us)


def test_what_is_known_counts_when_time_is_over(sample, invented):
    made = search.Search(sample, invented, 60, 0, lambda *_: None)
    made.run()
    late = search.Search(sample, invented, 0, 1, lambda *_: None, made.known)
    result = late.run()
    # A whole layer may be new, of what another draw had passed by.
    assert late.count <= 1
    assert sum(run.time_us for run in result.runs) <= 1.05 * made.cost(made.scheme)


def test_what_was_searched_first_is_searched_again(invented, monkeypatch):
    config = transformers.T5Config(
        vocab_size=97, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_decoder_layers=2, num_heads=4
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    own, seen, results = tuning.search, [], []

    def spy(sample, measurer, *, budget_s, **options):
        seen.append((sample.kind, len(sample.layer.operators), budget_s))
        # The first has no time at first, as where nothing is compiled yet.
        budget_s = budget_s if len(seen) > 1 else 0
        results.append(own(sample, measurer, budget_s=budget_s, **options))
        return results[-1]

    monkeypatch.setattr(tuning, "search", spy)
    report = stof_hf.tune(model, seq_len=32, budget_s=20, progress=False)
    kinds = [kind for kind, *_ in seen]
    assert kinds == [kinds[0], kinds[1], kinds[0]] and len(set(kinds)) == 2
    assert seen[0][1] < seen[1][1] and seen[2][2] > 0
    layers = {layer.kind: layer for layer in report.layers}
    # Both rounds count, and what they found falls.
    course = layers[kinds[0]].course
    assert [us for _, us in course] == sorted((us for _, us in course), reverse=True)
    assert layers[kinds[0]].measurements >= course[-1][0]
    assert results[2].time_us < results[0].time_us


def test_without_time_the_analytical_scheme_is_measured(sample, invented):
    made = search.Search(sample, invented, 0, 0, lambda *_: None)
    made.run()
    costs = {scheme: made.cost(scheme) for scheme in made.schemes()}
    assert costs[made.analytical()] < math.inf and max(costs.values()) == math.inf


def test_whole_layers_decide_between_what_is_nearly_as_fast(sample):
    """PyTorch's segments are the fastest by their sum; in a layer each costs more than it takes."""

    class Chained(dict):
        def __missing__(self, key):
            if key.startswith(sample.kind):
                return 20.0 + key.count("'torch'")
            return 9.9 if key.startswith("torch(") else 10.0

    measurer = Recorded(Chained())
    result = search.search(sample, measurer, budget_s=60)
    assert all(run.template != "torch" for run in result.runs)
    assert measurer.times[sample.layer_key(result.choice)] == 20.0


def test_sampling_beats_chance(sample):
    """Where parameters matter one by one, rewards find good ones sooner than chance."""

    class Smooth(dict):
        def __missing__(self, key):
            if not key.startswith("gemm("):
                return 1000.0
            values = dict(pair.split("=") for pair in key[5 : key.index(")")].split(","))
            wanted = {"block_m": 32, "block_n": 64, "block_k": 128, "stages": 4, "warps": 4}
            off = (abs(math.log2(int(values[k]) / v)) for k, v in wanted.items())
            return 50.0 * (1 + 0.3 * sum(off))

    ours, random = [], []
    for seed in range(5):
        measurer = Recorded(Smooth())
        result = search.search(sample, measurer, budget_s=60, seed=seed)
        ours.append(min(run.time_us for run in result.runs if run.template == "gemm"))
        arms = [key for key in measurer.times if key.startswith("gemm(")]
        measurer = Recorded(Smooth())
        made = search.Search(sample, measurer, 60, seed, lambda *_: None)
        spaces = {key.split(")")[1] for key in arms}
        space = search.TEMPLATES["gemm"].space
        count = len(arms) // len(spaces)
        random.append(min(
            Smooth()["gemm(" + ",".join(f"{k}={made.random.choice(v)}" for k, v in space.items())
                     + ")"]
            for _ in range(count)
        ))  # fmt: skip
    assert sum(ours) < sum(random)


@pytest.mark.parametrize("rows", [512, 5000])
def test_norms_of_many_rows_are_not_tried_in_front_of_products(rows):
    with replaying(Recorded(Invented())) as measurer:
        report = stof_hf.tune(
            build("gpt2"), batch_size=rows // 500, seq_len=500, budget_s=20, apply=False,
            progress=False,
        )  # fmt: skip
    assert report.layers[0].time_us
    tried = [key for key in measurer.times if key.startswith("gemm(") and ") [norm[" in key]
    assert bool(tried) == (rows <= 4096)


@pytest.mark.parametrize("rows, dtype, tried", [
    (500, torch.float16, False), (1000, torch.float16, True), (1000, torch.float32, False),
])  # fmt: skip
def test_large_tiles_are_tried_for_many_rows_of_half_precision(rows, dtype, tried):
    with replaying(Recorded(Invented())) as measurer:
        stof_hf.tune(
            build("bert").to(dtype), batch_size=rows // 125, seq_len=125, budget_s=20, apply=False,
            progress=False,
        )  # fmt: skip
    found = [key for key in measurer.times if key.startswith("gemm_hopper(")]
    assert bool(found) == tried
    assert not tried or all(any(name in key for key in found) for name in ("act[", "residual"))


def test_an_early_answer_on_ctrl_c():
    with replaying(_Pressed(25)):
        report = stof_hf.tune(build("bert"), seq_len=32, budget_s=60, progress=False)
    assert report.interrupted and report.layers and "stopped early" in str(report)


class _Pressed(Recorded):
    """Ctrl-C at a measurement."""

    def __init__(self, at):
        super().__init__(Invented())
        self.at = at

    def _time(self, key, make):
        if len(self.times) == self.at:
            self.at = -1
            raise KeyboardInterrupt
        return super()._time(key, make)


def test_what_is_slower_or_wrong_is_not_used():
    class Slow(Invented):
        def __missing__(self, key):
            return 1.0 if "own code" in key else super().__missing__(key)

    model = build("bert")
    with replaying(Recorded(Slow())):
        report = stof_hf.tune(model, seq_len=32, budget_s=20, progress=False)
    assert report.installed == 0 and "no faster" in report.layers[0].note
    assert not list(replaced(model))
    query = model.encoder.layer[0].attention.self.query.weight
    assert query._base is None and query.untyped_storage().nbytes() == query.nbytes
    # Found again, and still not used.
    assert stof_hf.apply_tuned(build("bert"), strict=True).installed == 0


def test_a_candidate_that_computes_something_else_never_wins(monkeypatch):
    from stof_hf.fusion import runners

    def wrong(part, shape):
        return lambda rows, residual, _: (rows @ part.weight.mT, residual)

    monkeypatch.setitem(runners._PYTORCH, ("gemm", "bias"), wrong)
    measurer = measure.Clock()
    with replaying(measurer):
        report = stof_hf.tune(build("bert"), seq_len=32, budget_s=2, progress=False)
    lost = [key for key, taken in measurer.times.items() if math.isinf(taken)]
    assert lost and all("bias" in key for key in lost)
    assert all(s.operators[:2] != ("gemm", "bias") for s in report.layers[0].segments)


def test_another_shape_takes_the_nearest_choice(invented):
    model = build("llama")
    report = stof_hf.tune(model, shapes=[(1, 16), (4, 32)], budget_s=20, progress=False)
    assert [(layer.batch_size, layer.seq_len) for layer in report.layers] == [(1, 16), (4, 32)]
    (fused, *_) = (vars(layer)["_stof_fused"] for layer in replaced(model))
    assert set(fused.choices) == {16, 128}
    assert fused.nearest(20) is fused.choices[16] and fused.nearest(999) is fused.choices[128]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_phases(name, phase):
    model = build(name)
    inputs = inputs_of(model, 12)
    options = {"max_new_tokens": 5, "do_sample": False}
    want = model.generate(**inputs, **options)
    report = stof_hf.tune(model, batch_size=2, seq_len=12, phase=phase, budget_s=2, progress=False)
    assert report.phase == phase
    assert (report.layers[0].batch_size, report.layers[0].seq_len) == (2, 12)
    assert torch.equal(model.generate(**inputs, **options), want)


def test_example_inputs_and_what_contradicts_them():
    model = build("bert")
    inputs = inputs_of(model)
    report = stof_hf.tune(model, inputs, budget_s=1, progress=False)
    assert (report.layers[0].batch_size, report.layers[0].seq_len) == (2, 50)
    with pytest.raises(StofError, match="either them, or sizes"):
        stof_hf.tune(model, inputs, seq_len=3)
    with pytest.raises(StofError, match="phase must be one of"):
        stof_hf.tune(model, phase="backward")
    with pytest.raises(UnsupportedError, match="takes 512 tokens, not 5000"):
        stof_hf.tune(model, seq_len=5000, progress=False)
    with pytest.raises(UnsupportedError, match="keeps no cache"):
        stof_hf.tune(build("vit"), phase="decode", progress=False)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    albert = transformers.AlbertModel(transformers.AlbertConfig(embedding_size=16, **small))
    with pytest.raises(UnsupportedError, match="no layer of AlbertModel is known"):
        stof_hf.tune(albert)


def test_layers_left_alone_have_one_line_each():
    model = build("bert")
    handle = model.encoder.layer[1].output.register_forward_hook(lambda *args: None)
    report = stof_hf.tune(model, seq_len=16, budget_s=1, progress=False)
    assert list(report.skipped) == ["encoder.layer.1"]
    assert "has forward hooks" in report.skipped["encoder.layer.1"]
    assert "encoder.layer.1 runs its own code" in str(report)
    handle.remove()


def test_the_model_stays_in_training_mode():
    model = build("bert")
    model.encoder.train()
    modes = [module.training for module in model.modules()]
    stof_hf.tune(model, seq_len=16, budget_s=1, progress=False)
    assert [module.training for module in model.modules()] == modes


@interpreted
def test_apply_false_changes_nothing(invented):
    model = build("llama")
    report = stof_hf.tune(model, seq_len=16, budget_s=5, apply=False, progress=False)
    assert report.installed == 0 and not list(replaced(model))
    after = [parameter.untyped_storage().nbytes() for parameter in model.parameters()]
    assert after == [parameter.nbytes for parameter in model.parameters()]
    places = [child.weight.data_ptr() for child in model.modules() if hasattr(child, "weight")]
    assert len(places) == len(set(places))
    assert stof_hf.apply_tuned(model).installed == 2


@interpreted
def test_of_several_results_the_one_for_the_models_mask_is_installed(invented):
    """Whichever was found last."""
    model = build("bert")
    stof_hf.tune(model, seq_len=32, budget_s=5, progress=False)
    where = cache.environment(torch.device("cpu"))
    ((key, entry), *rest) = cache.results(cache.fingerprint(model.config), "float32", where)
    assert not rest and key.mask == "none"
    kind, layer = next((k, v) for k, v in entry.layers.items() if k.startswith("BertLayer"))
    names = next(f.layer.names for f in find(build("bert")) if f.kind == kind)
    unfused = tuple(
        cache.Segment("attention" if name == "attention" else "torch", {}, 1.0) for name in names
    )
    other = cache.Layer(Scheme.unfused(names).bits, unfused)
    assert other.scheme != layer.scheme
    later = entry.measured + timedelta(days=1)
    sparse = dataclasses.replace(entry, layers={kind: other}, measured=later)
    cache.store(dataclasses.replace(key, mask="1/2"), sparse, where)

    def installed(model):
        stof_hf.apply_tuned(model)
        (fused, *_) = (vars(m)["_stof_fused"] for m in replaced(model) if "Layer" in str(type(m)))
        return fused.choices[32].scheme

    assert installed(build("bert")) == layer.scheme
    sparser = build("bert")
    stof_hf.set_pattern(sparser, stof_hf.patterns.SlidingWindow(0, 0))
    assert installed(sparser) == other.scheme


@interpreted
def test_a_pattern_need_not_be_made_for_every_length_that_is_tuned(invented):
    for tokens in (16, 32):
        stof_hf.tune(build("bert"), seq_len=tokens, budget_s=5, progress=False)
    model, seen = build("bert"), torch.ones(16, 16, dtype=torch.bool)
    pattern = stof_hf.patterns.Custom(lambda b, h, q, k: seen[q, k])
    stof_hf.set_pattern(model, pattern, persist=False)
    assert stof_hf.apply_tuned(model, strict=True).installed


def test_nothing_tuned():
    with pytest.warns(StofWarning, match="nothing is tuned"):
        assert stof_hf.apply_tuned(build("bert")).installed == 0
    with pytest.raises(StofError, match="nothing is tuned"):
        stof_hf.apply_tuned(build("bert"), strict=True)


@interpreted
def test_a_result_of_templates_that_are_gone_is_not_used(invented, monkeypatch):
    model = build("bert")
    stof_hf.tune(model, seq_len=16, budget_s=5, progress=False)
    stof_hf.restore(model)
    for segment, names in SEGMENTS.items():
        monkeypatch.setitem(
            SEGMENTS, segment, tuple(n for n in names if n in ("torch", "attention"))
        )
    with pytest.warns(StofWarning, match="tune again"):
        report = stof_hf.apply_tuned(model)
    assert report.installed == 0 and len(report.skipped) == len(find(model))


def test_report(tmp_path, invented):
    report = stof_hf.tune(build("bert"), seq_len=16, budget_s=5, progress=False)
    data = json.loads(json.dumps(report.to_json()))
    assert data["layers"][0]["segments"] and data["measurements"] == report.measurements
    assert "times as fast" in str(report) and "gemm" in str(report)
    report.plot(tmp_path / "tuned.png")
    assert (tmp_path / "tuned.png").stat().st_size > 10_000


_SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import torch
import stof_hf
from layers import build, first, inputs_of
model = build("bert", "sdpa")
inputs = inputs_of(model)
want = first(model, inputs)
{what}
torch.testing.assert_close(first(model, inputs), want)
print(report.installed, report.measurements)
"""


def test_two_processes(tmp_path):
    """Two that tune at once lose nothing; a third measures nothing."""
    package = str(Path(stof_hf.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": package, "STOF_CACHE_DIR": str(tmp_path)}

    def start(what):
        script = _SCRIPT.format(tests=str(Path(__file__).parent), what=what)
        return subprocess.Popen(
            [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True
        )

    tuning = "report = stof_hf.tune(model, seq_len={}, budget_s=2, progress=False)"
    both = [start(tuning.format(n)) for n in (16, 48)]
    assert [process.communicate()[0] is not None and process.returncode for process in both] == [
        0,
        0,
    ]
    (file,) = (tmp_path / "tuning").glob("*.json")
    assert sorted(e["key"]["seq_len"] for e in json.loads(file.read_text())["entries"]) == [16, 48]
    third = start("report = stof_hf.apply_tuned(model, strict=True)")
    assert third.communicate()[0].split()[1] == "0" and third.returncode == 0


def test_a_decoder_with_two_caches():
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.BertConfig(
        **sizes, intermediate_size=96, is_decoder=True, add_cross_attention=True
    )
    model = transformers.BertLMHeadModel(config).eval()
    model.set_attn_implementation("sdpa")
    ids = torch.randint(3, 97, (2, 12))
    want = model.generate(ids, max_new_tokens=4, do_sample=False)
    for phase in ("prefill", "decode"):
        report = stof_hf.tune(
            model, batch_size=2, seq_len=12, phase=phase, budget_s=1, progress=False
        )
        assert report.layers[0].seq_len == 12
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), want)


def test_a_pattern_is_part_of_what_was_tuned(invented):
    model = build("bert")
    keys = []
    for pattern in (None, stof_hf.patterns.SlidingWindow(16, 16), stof_hf.patterns.BigBird(16)):
        stof_hf.set_pattern(model, None)
        if pattern is not None:
            stof_hf.set_pattern(model, pattern)
        stof_hf.tune(model, seq_len=500, budget_s=5, progress=False)
        keys.append({key for key in invented.times if key.startswith("attention(")})
    assert [len(found) for found in keys] == [1, 2, 3]
    (file,) = [file for file in cache.list_() if not file.shipped]
    assert {key.mask for key in file.entries} >= {"none", "1/8"}
