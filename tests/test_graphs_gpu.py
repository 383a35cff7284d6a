"""use_graphs on a GPU: what tests/test_graphs.py says of tapes, of CUDA graphs."""

import copy
import gc
import inspect
import threading
import time
import warnings

import pytest
import torch
import transformers
from layers import build, inputs_of, sizes
from taping import compare, ids, masked, same
from transformers.masking_utils import eager_mask

import stof_hf
from stof_hf import StofWarning
from stof_hf.fusion.install import find, install
from stof_hf.masks import cache as mask_cache

pytestmark = pytest.mark.gpu

TEXT = ["bert", "roberta", "modernbert", "gpt2", "llama", "mistral", "qwen2"]
DECODERS = {"gpt2", "llama", "mistral", "qwen2"}
#: Where Transformers' mask for eager attention copies no number to the GPU, as it did in 5.17.
EAGER = ["eager"] if "torch.tensor(" not in inspect.getsource(eager_mask) else []
#: Of fp16, whose products are added up in another order for another shape.
TOLERANCE = 2e-2


def pair(name, implementation="stof", dtype=torch.float16, **options):
    """Twice the same model on the GPU, one of them with graphs."""
    model, plain = (build(name, implementation).to("cuda", dtype) for _ in range(2))
    stof_hf.use_graphs(model, **options)
    return model, plain


def on_gpu(call):
    return {name: x.cuda() for name, x in call.items()}


def captured(model):
    return len(model.__dict__["_stof_graphs"]._graphs)


@pytest.fixture(autouse=True)
def no_fallbacks():
    with warnings.catch_warnings():
        warnings.simplefilter("error", StofWarning)
        yield


@pytest.mark.parametrize("implementation", ["stof", "sdpa", *EAGER])
@pytest.mark.parametrize("name", TEXT)
def test_lengths_and_masks_of_a_bucket(name, implementation):
    model, plain = pair(name, implementation)
    options = {"use_cache": False} if name in DECODERS else {}
    calls = [masked(2, 50), masked(2, 50), masked(2, 41, left=7), masked(2, 63, right=9)]
    calls += [masked(2, 64, 5, 5), masked(2, 33, seed=3), masked(2, 64)]
    compare(model, plain, list(map(on_gpu, calls)), TOLERANCE, **options)
    assert captured(model) == 1
    calls = [{"input_ids": ids(2, n, n)} for n in (64, 64, 40, 63, 64)]
    compare(model, plain, list(map(on_gpu, calls)), TOLERANCE, **options)
    assert captured(model) == 2


@pytest.mark.parametrize("implementation", ["stof", "sdpa", *EAGER])
def test_images(implementation):
    model, plain = pair("vit", implementation)
    calls = [{"pixel_values": torch.randn(2, 3, 28, 28, device="cuda").half()} for _ in range(4)]
    compare(model, plain, calls, TOLERANCE)
    assert captured(model) == 1


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "gpt2", "llama"])
def test_replaced_layers_and_patterns(name):
    model, plain = (build(name).to("cuda", torch.float16) for _ in range(2))
    install(find(model))
    for one in (model, plain):
        stof_hf.set_pattern(one, stof_hf.patterns.Longformer(16, (0,)), persist=False)
    stof_hf.use_graphs(model)
    options = {"use_cache": False} if name in DECODERS else {}
    # Packing moves weights when a layer first runs, and graphs are captured behind that.
    calls = [on_gpu(masked(2, n, left=3)) for n in (50, 50, 50, 41, 64)]
    compare(model, plain, calls, TOLERANCE, **options)
    assert captured(model) == 1
    mask_cache.clear()
    torch.cuda.empty_cache()
    torch.randn(1 << 24, device="cuda")
    compare(model, plain, calls, TOLERANCE, **options)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_cache_that_a_forward_returns(name):
    model, plain = pair(name)
    with torch.no_grad():
        outs = [model(ids(2, n).cuda()) for n in (50, 50, 41)]
        assert captured(model) == 1
        for got, n in zip(outs, (50, 50, 41), strict=True):
            wanted = plain(ids(2, n).cuda())
            same(got.logits, wanted.logits, None, TOLERANCE)
            mine, theirs = got.past_key_values.layers[1], wanted.past_key_values.layers[1]
            same(mine.keys, theirs.keys, None, TOLERANCE)


def test_inference_mode_hidden_states_and_tuples():
    model, plain = pair("bert")
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        for n in (50, 41):
            call = on_gpu(masked(2, n, left=3))
            for options in ({"output_hidden_states": True}, {"return_dict": False}):
                with mode():
                    got, wanted = model(**call, **options), plain(**call, **options)
                same(got, wanted, call["attention_mask"], TOLERANCE)
    assert captured(model) == 2


def test_least_recently_used_goes_and_graphs_share_memory():
    model, plain = pair("bert", max_graphs=2)
    for length in (64, 128, 64, 128, 192, 192, 64, 64, 128, 128):
        compare(model, plain, [on_gpu(masked(8, length))], TOLERANCE)
        assert captured(model) <= 2
    stof_hf.restore(model)
    stof_hf.use_graphs(model, max_graphs=1)
    for length in (64, 64, 128, 128, 64):
        compare(model, plain, [on_gpu(masked(8, length))], TOLERANCE)
    assert captured(model) == 1


def test_streams_and_threads():
    model, plain = pair("bert")
    calls = [on_gpu(masked(2, 30 + 7 * i, left=i, seed=i)) for i in range(8)]
    compare(model, plain, calls, TOLERANCE)
    torch.cuda.synchronize()
    wrong = []

    @torch.no_grad()
    def work(first):
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(40):
                call = calls[(first + i) % len(calls)]
                try:
                    got = model(**call)[0].clone()
                    same(got, plain(**call)[0], call["attention_mask"], TOLERANCE)
                except Exception as error:
                    wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Reading(transformers.BertModel):
    """A forward that no graph can repeat."""

    def forward(self, input_ids):
        out = super().forward(input_ids)
        return out if input_ids.sum().item() >= 0 else None


def test_a_capture_that_fails_leaves_everything_in_order():
    model = Reading(transformers.BertConfig(**sizes(64))).eval().cuda()
    stof_hf.use_graphs(model)
    call = ids(2, 50).cuda()
    with torch.no_grad(), pytest.warns(StofWarning, match="item") as said:
        for _ in range(3):
            assert model(call).last_hidden_state.shape[1] == 50
    assert len(said) == 1
    torch.randn(4, device="cuda")
    torch.nn.functional.dropout(torch.ones(4, device="cuda"))
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    model, plain = pair("bert")
    compare(model, plain, [on_gpu(masked(2, 50))] * 3, TOLERANCE)
    assert captured(model) == 1


def test_garbage_that_holds_a_graph_is_not_collected_in_a_capture():
    old = torch.cuda.CUDAGraph()
    with torch.cuda.graph(old):
        torch.zeros(4, device="cuda")
    held = [old]
    held.append([held])
    holders = [held]
    del old, held

    class Dropping(transformers.BertModel):
        def forward(self, input_ids):
            if torch.cuda.is_current_stream_capturing():
                holders.clear()
                [[] for _ in range(1000)]
            return super().forward(input_ids)

    model = Dropping(transformers.BertConfig(**sizes(64))).eval().cuda()
    stof_hf.use_graphs(model)
    thresholds = gc.get_threshold()
    gc.set_threshold(10, 1, 1)
    try:
        with torch.no_grad():
            for _ in range(3):
                model(ids(2, 50).cuda())
    finally:
        gc.set_threshold(*thresholds)
    assert not holders and captured(model) == 1


def test_workspaces_of_products_belong_to_the_graph():
    model, plain = pair("bert")
    call = on_gpu(masked(8, 128))
    compare(model, plain, [call] * 3, TOLERANCE)
    # As torch.compile with CUDA graphs does.
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    compare(model, plain, [call] * 3, TOLERANCE)


def test_models_that_torch_compile_captures_beside_it():
    model, plain = pair("bert")
    calls = [on_gpu(masked(2, 50))] * 3
    compare(model, plain, calls, TOLERANCE)
    other = torch.compile(build("bert", "sdpa").to("cuda", torch.float16), mode="reduce-overhead")
    for _ in range(4):
        with torch.no_grad():
            other(**calls[0])
        torch.cuda.empty_cache()
        compare(model, plain, calls, TOLERANCE)


def test_off_while_the_caller_captures():
    model, plain = pair("bert")
    call = on_gpu(masked(2, 64))
    compare(model, plain, [call] * 3, TOLERANCE)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = model(**call).last_hidden_state
    graph.replay()
    same(out, plain(**call).last_hidden_state, call["attention_mask"], TOLERANCE)


def test_masks_that_a_graph_of_the_callers_reads_stay():
    """Whatever else is built afterwards."""
    model = build("bert", "stof").to("cuda", torch.float16)
    stof_hf.set_pattern(model, stof_hf.patterns.Longformer(20, (0,)))
    given = on_gpu(masked(2, 64))
    mask_cache.clear()
    with torch.no_grad():
        want = model(**given)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = model(**given)[0]
        mask_cache.clear()
        gc.collect()
        room = [torch.full((n,), -1, device="cuda") for n in range(64, 4096, 64)]
        graph.replay()
        assert torch.equal(got, want) and room


def test_moved_weights_and_copies():
    model, plain = pair("bert")
    calls = [on_gpu(masked(2, 50))] * 2
    compare(model, plain, calls, TOLERANCE)
    other = copy.deepcopy(model)
    compare(model.bfloat16(), plain.bfloat16(), calls, 0.1)
    compare(other, plain.half(), calls, 0.1)
    # The weights went through bfloat16 in between.
    assert captured(model) == captured(other) == 1
    model.float().cpu()
    with torch.no_grad():
        assert model(**masked(2, 50)).last_hidden_state.device.type == "cpu"


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_replay_takes_the_host_little_time(name):
    model, plain = pair(name)
    call = on_gpu(inputs_of(model))
    options = {"use_cache": False} if name in DECODERS else {}

    def host_us(one):
        times = []
        with torch.no_grad():
            for _ in range(10):
                one(**call, **options)
            for _ in range(100):
                torch.cuda.synchronize()
                start = time.perf_counter()
                one(**call, **options)
                times.append(time.perf_counter() - start)
        return 1e6 * sorted(times)[len(times) // 2]

    mine, theirs = host_us(model), host_us(plain)
    print(f"{name}: {mine:.0f} us with graphs, {theirs:.0f} us without")
    assert captured(model) == 1
    assert mine < theirs / 3


@pytest.mark.parametrize("implementation", ["stof", "sdpa"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
def test_steps_of_generation(name, implementation, ran, monkeypatch):
    model, plain = pair(name, implementation, torch.float32)
    install(find(model))
    for one in (model, plain):
        for parameter in one.parameters():
            # Tokens whose logits are nearly the same are no test.
            parameter.data.mul_(4 if parameter.ndim > 1 else 1)

    def compiled(*args, **kwargs):
        raise AssertionError("a step is compiled")

    monkeypatch.setattr(torch, "compile", compiled)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    for i in range(3):
        inputs = on_gpu(masked(2, 20, left=6 + i, seed=i))
        want = plain.generate(**inputs, **options)
        with torch.inference_mode(i == 2):
            got = model.generate(**inputs, cache_implementation="static", **options)
        assert torch.equal(got, want)
        # The graph of a cache that is gone went with it.
        assert captured(model) == 1
    # Each time two layers in the prefill, the first step, what warms up twice, and the capture.
    assert len(ran) == 3 * 10
