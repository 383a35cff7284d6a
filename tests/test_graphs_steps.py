"""Steps of generation with a static cache as graphs, on the CPU with tapes: see tests/taping.py."""

import copy
import warnings
import weakref

import pytest
import torch
import transformers
from layers import build
from taping import TapeRecorder, masked
from transformers import CompileConfig, DynamicCache, StaticCache

import stof_hf
from stof_hf import StofWarning, patterns
from stof_hf.fusion.install import find, install
from stof_hf.runtime import captured, graphs
from stof_hf.runtime.buckets import Unknown
from stof_hf.runtime.recorder import no_collection

ROOM = 60


@pytest.fixture(autouse=True)
def taping(monkeypatch):
    monkeypatch.setattr(graphs, "Recorder", TapeRecorder)

    def compiled(*args, **kwargs):
        raise AssertionError("a step is compiled")

    monkeypatch.setattr(torch, "compile", compiled)
    with warnings.catch_warnings():
        warnings.simplefilter("error", StofWarning)
        yield


def generate(model, inputs, count=12, **options):
    """As on a GPU, where a static cache is enough for steps to be compiled."""
    if "past_key_values" not in options:
        options["cache_implementation"] = "static"
    everywhere = CompileConfig()
    everywhere._compile_all_devices = True
    return model.generate(
        **inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0,
        compile_config=everywhere, **options,
    )  # fmt: skip


def wanted(model, inputs, count=12, **options):
    """By the own code, with a cache that grows."""
    return model.generate(
        **inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0,
        **options,
    )  # fmt: skip


def pair(name, implementation="stof"):
    model, plain = build(name, implementation), build(name, implementation)
    for one in (model, plain):
        with torch.no_grad():
            for parameter in one.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(4)
    install(find(model))
    stof_hf.use_graphs(model)
    return model, plain, TapeRecorder.latest


@pytest.fixture(params=["llama", "gpt2", "qwen2", "qwen3"])
def name(request):
    return request.param


@pytest.mark.parametrize("implementation", ["stof", "sdpa", "eager"])
def test_tokens_are_those_of_the_own_code(name, implementation):
    model, plain, recorder = pair(name, implementation)
    for inputs in (masked(2, 20, left=6), masked(1, 9)):
        assert torch.equal(generate(model, inputs), wanted(plain, inputs))
    # A prefill and 11 steps, of which the first is the forward's own.
    assert (recorder.captures, recorder.replays) == (2, 20)


def test_replaced_layers_run_under_a_pattern(ran):
    model, plain, recorder = pair("llama")
    for one in (model, plain):
        stof_hf.set_pattern(one, patterns.Longformer(8, (0,)), persist=False)
    inputs = masked(2, 30, left=4)
    tokens = generate(model, inputs)
    # Two layers in the prefill, the first step, what warms up, and the capture.
    assert len(ran) == 8
    assert torch.equal(tokens, wanted(plain, inputs))
    assert recorder.replays == 10


@torch.no_grad()
def test_logits_and_cache_are_those_of_the_own_code():
    model, plain, recorder = pair("llama")
    mine, own = (StaticCache(one.config, max_cache_len=ROOM) for one in (model, plain))
    first = masked(2, 20, left=6)
    for one, cache in ((model, mine), (plain, own)):
        one(**first, past_key_values=cache, use_cache=True)
    step, mask = model.get_compiled_call(None), first["attention_mask"]
    for i in range(6):
        mask = torch.cat((mask, mask.new_ones(2, 1)), 1)
        ids = torch.full((2, 1), 5 + i)
        given = {"input_ids": ids, "attention_mask": mask, "use_cache": True, "return_dict": True}
        got = step(**given, past_key_values=mine)
        want = plain(**given, past_key_values=own)
        torch.testing.assert_close(got.logits, want.logits, atol=1e-5, rtol=1e-5)
        assert got.past_key_values is mine and list(got) == list(want)
    assert recorder.replays == 5
    for a, b in zip(mine.layers, own.layers, strict=True):
        assert torch.equal(a.cumulative_length, b.cumulative_length)
        torch.testing.assert_close(a.keys, b.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a.values, b.values, atol=1e-5, rtol=1e-5)


def test_results_are_the_callers_own():
    model, plain, _ = pair("llama")
    inputs = masked(2, 20)
    logits = {"output_logits": True, "return_dict_in_generate": True}
    out, want = generate(model, inputs, **logits), wanted(plain, inputs, **logits)
    for got, one in zip(out.logits, want.logits, strict=True):
        torch.testing.assert_close(got, one, atol=1e-4, rtol=1e-4)


def test_inference_mode():
    model, plain, recorder = pair("llama")
    inputs = masked(2, 20, left=3)
    with torch.inference_mode():
        assert torch.equal(generate(model, inputs), wanted(plain, inputs))
    assert recorder.replays == 10


def test_a_cache_is_not_kept_alive():
    model, _, recorder = pair("llama")
    cache = StaticCache(model.config, max_cache_len=ROOM)
    gone = weakref.ref(cache)
    generate(model, masked(2, 20), past_key_values=cache)
    assert recorder.replays == 10
    with no_collection():
        del cache
        assert gone() is None
    generate(model, masked(2, 20))
    kept = model.__dict__["_stof_graphs"]
    assert len(kept._graphs) == len(kept._rooms) == 1


def test_a_cache_that_is_used_again():
    model, plain, recorder = pair("llama")
    cache = StaticCache(model.config, max_cache_len=ROOM)
    for seed in range(3):
        inputs = masked(2, 20, left=1 + seed, seed=seed)
        cache.reset()
        assert torch.equal(generate(model, inputs, past_key_values=cache), wanted(plain, inputs))
    # Two captures less one: the kind of step has been seen.
    assert (recorder.captures, recorder.replays) == (1, 10 + 11 + 11)


def test_changes_of_the_model_are_seen():
    model, plain, recorder = pair("llama")
    cache = StaticCache(model.config, max_cache_len=ROOM)
    inputs = masked(2, 20)
    generate(model, inputs, past_key_values=cache)
    for one in (model, plain):
        one.lm_head.weight = torch.nn.Parameter(one.lm_head.weight.flip(0).clone())
        stof_hf.set_pattern(one, patterns.SlidingWindow(5, 0), persist=False)
    cache.reset()
    assert torch.equal(generate(model, inputs, past_key_values=cache), wanted(plain, inputs))
    assert recorder.captures == 2


def test_what_cannot_be_captured_takes_each_step_once(monkeypatch):
    model, plain, recorder = pair("llama")
    inputs = masked(2, 20)

    tried = []

    def capture(run, device, undo):
        tried.append(1)
        run()
        raise RuntimeError("no such thing")

    monkeypatch.setattr(recorder, "capture", capture)
    with pytest.warns(StofWarning, match="LlamaForCausalLM runs without CUDA graphs: .*no such"):
        got = generate(model, inputs)
    assert torch.equal(got, wanted(plain, inputs))
    # Nor is it tried for another cache.
    assert torch.equal(generate(model, inputs), wanted(plain, inputs)) and len(tried) == 1


def test_an_output_that_cannot_be_copied_takes_no_step(monkeypatch):
    model, plain, recorder = pair("llama")
    inputs = masked(2, 20)
    monkeypatch.setattr(captured, "copy_out", unknown)
    with pytest.warns(StofWarning, match="without CUDA graphs: .*it returns a strange thing"):
        got = generate(model, inputs)
    assert torch.equal(got, wanted(plain, inputs)) and recorder.replays == 0


def unknown(*_, **__):
    raise Unknown("a strange thing")


@pytest.mark.parametrize("name, how", [
    ("mistral", "windows"), ("llama", "training"), ("llama", "restored"), ("llama", "not tuned"),
])  # fmt: skip
def test_others_are_compiled_as_ever(name, how, monkeypatch):
    model, _, recorder = pair(name)
    called = []

    def compiled(self, config):
        called.append(config)
        return self.__call__

    monkeypatch.setattr(type(model).replaced, "get_compiled_call", compiled)
    if how == "training":
        model.train()
    if how in ("restored", "not tuned"):
        stof_hf.restore(model)
    if how == "not tuned":
        stof_hf.use_graphs(model)
    generate(model, masked(2, 20), count=4)
    assert called and recorder.replays == 0
    if how == "not tuned":
        called.clear()
        install(find(model))
        generate(model, masked(2, 20), count=4)
        assert not called and TapeRecorder.latest.replays == 2


@torch.no_grad()
def test_only_caches_that_count_on_the_device_are_taken():
    model, _, _ = pair("llama")
    cache = StaticCache(model.config, max_cache_len=ROOM)
    assert graphs._takes(model, cache, look=True)
    cache.offloading = True
    for other in (cache, None, DynamicCache()):
        assert not graphs._takes(model, other, look=True)


def test_models_with_masks_of_their_own_keep_them():
    cls = transformers.Gemma3ForConditionalGeneration
    made = graphs._subclass(cls)
    assert made.create_masks_for_generate is cls.create_masks_for_generate
    assert made.get_compiled_call is cls.get_compiled_call


def test_hooks_on_the_model_run_in_every_step():
    model, plain, recorder = pair("llama")
    inputs, seen = masked(2, 20), []
    model.register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(generate(model, inputs), wanted(plain, inputs))
    assert len(seen) == 12 and recorder.replays == 0


def test_copies_capture_their_own():
    model, plain, _ = pair("llama")
    inputs = masked(2, 20)
    generate(model, inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(generate(twin, inputs), wanted(plain, inputs))
