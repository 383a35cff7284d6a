"""Tuning on a GPU: templates as they are compiled, prepared launches, graphs, the cache."""

import copy

import pytest
import torch
from layers import build, inputs_of

import stof_hf
from stof_hf.fusion.fused import Choice
from stof_hf.fusion.install import find, install, replaced
from stof_hf.fusion.layer_ops import SEGMENTS, schemes
from stof_hf.fusion.runners import TEMPLATES
from stof_hf.fusion.templates.launch import Prepared
from stof_hf.tuning import cache

pytestmark = pytest.mark.gpu

NAMES = [
    "bert", "roberta", "distilbert", "gpt2", "llama", "modernbert", "vit", "qwen2", "qwen3", "t5",
]  # fmt: skip
each_model = pytest.mark.parametrize("name", NAMES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "folder", lambda: tmp_path / "tuning")


def on_gpu(name, dtype):
    model = build(name, width=256).to("cuda", dtype)
    inputs = {key: value.cuda() for key, value in inputs_of(model).items()}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    return model, inputs


def real(out, inputs):
    """Rows of tokens that are not padding."""
    mask = inputs.get("attention_mask")
    return out if mask is None else out[mask.bool()]


@torch.no_grad()
def run(model, inputs):
    return real(model(**inputs)[0].float(), inputs)


def error(got, want):
    return float((got - want).norm() / want.norm())


@pytest.fixture
def launches(monkeypatch):
    """How many kernels were launched as they were prepared."""
    count, repeat = [], Prepared._repeat
    monkeypatch.setattr(Prepared, "_repeat", lambda *args: count.append(1) or repeat(*args))
    return count


@each_dtype
@each_model
def test_templates_compute_what_the_layers_do(name, dtype, launches):
    model, inputs = on_gpu(name, dtype)
    exact = run(copy.deepcopy(model).float(), {
        key: value.float() if value.is_floating_point() else value for key, value in inputs.items()
    })  # fmt: skip
    plain = error(run(model, inputs), exact)
    found = find(model)
    choices = {}
    for one in (each for each in found if each.reason is None):
        best = schemes(one.layer.names)[0]
        runs = {}
        for segment in best.segments:
            # What is not for one row alone.
            known = [t for t in SEGMENTS[segment] if t != "torch" and TEMPLATES[t].serves(100)]
            template = known[0] if known else "torch"
            runs[segment] = template, {} if template == "torch" else None
        choices[one.kind] = {100: Choice.of(best, runs)}
    assert len(install(found, choices)) == sum(each.reason is None for each in found)
    for _ in range(3):
        assert error(run(model, inputs), exact) <= 1.25 * plain
    assert len(launches) >= 2 * len(choices)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    got = run(model, inputs)
    stof_hf.restore(model)
    assert error(got, run(model, inputs)) < 4 * plain + 1e-3


@each_model
def test_tune(name):
    model, inputs = on_gpu(name, torch.float16)
    want = run(model, inputs)
    size = {} if name == "vit" else {"batch_size": 2, "seq_len": 50}
    report = stof_hf.tune(model, **size, budget_s=15, progress=False)
    print(report)
    assert report.layers and (name == "t5" or not report.skipped)
    assert all(segment.time_us < 1e4 for layer in report.layers for segment in layer.segments)
    failed = [key for key, taken in report.timings.items() if taken is None]
    assert not failed, failed
    assert error(run(model, inputs), want) < 5e-3
    again, _ = on_gpu(name, torch.float16)
    assert stof_hf.apply_tuned(again).installed == report.installed
    assert error(run(again, inputs), want) < 5e-3
    stof_hf.restore(model)
    assert not list(replaced(model)) and torch.equal(run(model, inputs), want)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_phases(phase):
    model, _ = on_gpu("llama", torch.float16)
    report = stof_hf.tune(model, batch_size=2, seq_len=64, phase=phase, budget_s=15, progress=False)
    ids = torch.randint(3, 97, (2, 30), device="cuda")
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True,
               "return_dict_in_generate": True}  # fmt: skip
    got = model.generate(ids, **options)
    stof_hf.restore(model)
    want = model.generate(ids, **options)
    assert error(got.logits[0].float(), want.logits[0].float()) < 5e-3
    assert report.layers[0].seq_len == 64


def test_a_pattern_whose_function_reads_the_gpu():
    model, inputs = on_gpu("bert", torch.float16)
    inputs = {"input_ids": inputs["input_ids"]}
    near = torch.rand(50, 50, device="cuda") < 0.5
    near.fill_diagonal_(True)
    pattern = stof_hf.patterns.Custom(lambda b, h, q, k: near[q, k], key="near")
    stof_hf.set_pattern(model, pattern, persist=False)
    want = run(model, inputs)
    report = stof_hf.tune(model, inputs, budget_s=10, progress=False)
    assert report.installed and error(run(model, inputs), want) < 5e-3


def test_a_tuned_model_is_captured():
    model, inputs = on_gpu("bert", torch.float16)
    inputs = {"input_ids": inputs["input_ids"]}
    stof_hf.tune(model, batch_size=2, seq_len=50, budget_s=10, progress=False)
    want = run(model, inputs)
    static = {key: value.clone() for key, value in inputs.items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        model(**static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = model(**static)[0]
    other = torch.randint(3, 97, (2, 50), device="cuda")
    static["input_ids"].copy_(other)
    graph.replay()
    torch.testing.assert_close(out.float(), run(model, {"input_ids": other}), rtol=0, atol=1e-2)
    static["input_ids"].copy_(inputs["input_ids"])
    graph.replay()
    torch.testing.assert_close(out.float(), want, rtol=0, atol=1e-2)


def test_packing_holds_nothing_twice():
    model, inputs = on_gpu("bert", torch.float16)
    run(model, inputs)
    before = torch.cuda.memory_allocated()
    install(find(model))
    run(model, inputs)
    held = torch.cuda.memory_allocated() - before
    # What a cached mask or a plan takes, not a weight.
    assert held < model.encoder.layer[0].attention.self.query.weight.nbytes
