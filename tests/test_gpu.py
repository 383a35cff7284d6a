"""What only a CUDA GPU shows: no hidden synchronisation, CUDA graphs, gradients, equal masks."""

import numpy as np
import pytest
import torch
import transformers
from torch.nn.attention.flex_attention import create_block_mask

import stof_hf
from stof_hf import SparseMask, patterns
from stof_hf.attention.reference import reference_attention

pytestmark = pytest.mark.gpu

CLOSED_FORM = [
    patterns.Causal(),
    patterns.Longformer(100, (0, 700)),
    patterns.BigBird(64, (0,), 2),
    patterns.Documents([i // 100 for i in range(1000)]) & patterns.Causal(),
    ~patterns.Chunked(300),
    patterns.SlidingWindow(100, 100) | patterns.GlobalKeys((3, 700)),
    patterns.BlockTable(np.random.default_rng(0).random((4, 16, 16)) < 0.3, 64),
    patterns.BlockTable(np.random.default_rng(0).random((1, 30, 30)) < 0.3, 35),
]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture
def no_sync():
    """Turns synchronisations into errors between calls of no_sync(True) and the test's end."""

    def switch(on):
        torch.cuda.set_sync_debug_mode("error" if on else "default")

    yield switch
    switch(False)


def make(*shape_pairs, dtype=torch.float32, grad=False):
    out = []
    for i, shape in enumerate(shape_pairs):
        g = torch.Generator().manual_seed(i)
        x = torch.randn(shape, generator=g).cuda().to(dtype)
        out.append(x.transpose(1, 2).contiguous().transpose(1, 2).detach().requires_grad_(grad))
    return out


@pytest.mark.parametrize("pattern", CLOSED_FORM, ids=lambda p: type(p).__name__)
def test_closed_form_builds_without_synchronising(pattern, no_sync):
    SparseMask.from_pattern(pattern, 1000, device="cuda")
    valid = torch.ones(2, 1000, dtype=torch.bool, device="cuda")
    no_sync(True)
    mask = SparseMask.from_pattern(pattern, 1000, device="cuda").with_padding(valid)
    view = mask.rows(torch.zeros(1, dtype=torch.int64, device="cuda"), 1, 500)
    no_sync(False)
    assert torch.equal(mask.to_dense()[:1].cpu(), SparseMask.from_pattern(pattern, 1000).to_dense())
    assert torch.equal(view.to_dense(), mask.to_dense()[:1, :, :1, :500])


def test_attention_with_a_cached_mask_does_not_synchronise(no_sync):
    q, k, v = make((2, 8, 1000, 64), (2, 2, 1000, 64), (2, 2, 1000, 64), dtype=torch.bfloat16)
    mask = SparseMask.from_pattern(patterns.Longformer(100, (0,)), 1000, device="cuda")
    valid = torch.ones(2, 1000, dtype=torch.bool, device="cuda")
    start = torch.tensor([700], device="cuda")
    for on in (False, True):
        no_sync(on)
        stof_hf.attention(q, k, v, mask.with_padding(valid))
        stof_hf.attention(q[:, :, :1], k, v, mask.rows(start, 1, 1000))


@pytest.mark.parametrize("pattern", CLOSED_FORM, ids=lambda p: type(p).__name__)
def test_builders_on_the_gpu_equal_those_on_the_cpu(pattern):
    want = SparseMask.from_pattern(pattern, 1000)
    dense = want.to_dense().cuda()
    bound, heads = pattern.bind(1000), dense.shape[1]
    block_mask = create_block_mask(
        lambda b, h, q, k: dense[0, h, q, k], 1, heads, 1000, 1000, device="cuda"
    )
    for mask in (
        SparseMask.from_pattern(pattern, 1000, device="cuda"),
        SparseMask.from_function(bound.__call__, 1000, heads=heads, device="cuda"),
        SparseMask.from_dense(dense),
        SparseMask.from_coo(dense.to_sparse()),
        SparseMask.from_block_mask(block_mask),
        want.to("cuda"),
    ):
        assert mask.device.type == mask.tile_bits.device.type == "cuda"
        assert torch.equal(mask.to_dense(), dense)
        assert torch.equal(mask.run_col.cpu(), want.run_col)
        assert torch.equal(mask.run_len.cpu(), want.run_len)
        assert mask.kept == want.kept and mask.valid_share == want.valid_share


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("pattern", [None, *CLOSED_FORM], ids=lambda p: type(p).__name__)
def test_forward_and_backward(pattern, dtype):
    tensors = make((2, 4, 333, 64), (2, 2, 333, 64), (2, 2, 333, 32), dtype=dtype, grad=True)
    mask = allowed = None
    if pattern is not None:
        valid = torch.arange(333, device="cuda") < torch.tensor([[333], [200]], device="cuda")
        mask = SparseMask.from_pattern(pattern, 333, device="cuda", padding=valid)
        allowed = mask.to_dense()
    bias = torch.randn(4, 1, 333, device="cuda", requires_grad=True)
    sinks = torch.randn(4, device="cuda", requires_grad=True)
    inputs = [*tensors, bias, sinks]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = stof_hf.attention(*tensors, mask, bias=bias, sinks=sinks, softcap=20.0)
    want, _ = reference_attention(*exact[:3], allowed, bias=exact[3], sinks=exact[4], softcap=20.0)
    upstream = torch.randn_like(out) / 8
    grads = torch.autograd.grad(out, inputs, upstream)
    want_grads = torch.autograd.grad(want, exact, upstream.double())
    for got, expected in zip((out, *grads), (want, *want_grads), strict=True):
        # Gradients of bias and sinks add up the roundings of many rows.
        limit = TOLERANCE[dtype] * (1 + expected.abs().max().item())
        limit *= 1 if got.ndim == 4 else 30
        assert (got.double() - expected).abs().max().item() <= limit


def test_cuda_graph_replays_with_new_inputs_and_offsets():
    q, k, v = make((2, 8, 1, 64), (2, 2, 512, 64), (2, 2, 512, 64), dtype=torch.float16)
    storage = SparseMask.from_pattern(patterns.SlidingWindow(50, 0), 512, device="cuda")
    start = torch.tensor([100], device="cuda")
    view = storage.rows(start, 1, 512)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        stof_hf.attention(q, k, v, view)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = stof_hf.attention(q, k, v, view)
    for row in (3, 400, 511):
        q.normal_()
        start.fill_(row)
        graph.replay()
        want, _ = reference_attention(q, k, v, storage.to_dense()[:, :, row : row + 1])
        torch.testing.assert_close(out.double(), want, atol=3e-3, rtol=3e-3)


@torch.no_grad()
def test_compiled_model_with_a_mask_tensor():
    config = transformers.BertConfig(num_hidden_layers=2, hidden_size=128, num_attention_heads=2)
    model = transformers.BertModel._from_config(config, attn_implementation="stof")
    model = model.eval().to("cuda", torch.float16)
    ids = torch.randint(5, 99, (2, 100), device="cuda")
    mask = (torch.rand(2, 1, 100, 100, device="cuda") < 0.3) | torch.eye(100, device="cuda").bool()
    want = model(ids, attention_mask=mask)[0]
    got = torch.compile(model)(ids, attention_mask=mask)[0]
    torch.testing.assert_close(got, want, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile_fullgraph(mode):
    mask = SparseMask.from_pattern(patterns.Longformer(50, (0,)), 300, device="cuda")
    compiled = torch.compile(
        lambda q, k, v: stof_hf.attention(q, k, v, mask) * 2, fullgraph=True, mode=mode
    )
    for seed in range(3):
        torch.manual_seed(seed)
        q, k, v = (torch.randn(2, 4, 300, 64, device="cuda") for _ in range(3))
        want, _ = reference_attention(q, k, v, mask.to_dense())
        torch.testing.assert_close(compiled(q, k, v).double(), 2 * want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pattern", [None, patterns.SlidingWindow(20, 0)], ids=["own", "window"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(cache, pattern):
    """With a static cache, Transformers compiles the step to CUDA graphs by itself."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=128, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).cuda().eval()
    model.set_attn_implementation("stof")
    ids = torch.randint(1, 97, (2, 12), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    if pattern is not None:
        stof_hf.set_pattern(model, pattern)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=256, min_new_tokens=256, do_sample=False,
        output_logits=True, return_dict_in_generate=True, pad_token_id=0,
        cache_implementation=None if cache == "dynamic" else "static",
    )  # fmt: skip
    if cache == "static":
        assert 1 <= counters["stats"]["unique_graphs"] <= 2
    full = torch.cat([mask, mask.new_ones(2, 256)], 1)
    with torch.no_grad():
        if pattern is None:
            model.set_attn_implementation("eager")
        want = model(
            out.sequences, attention_mask=full, position_ids=(full.cumsum(-1) - 1).clamp(min=0)
        ).logits[:, 11:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), want.float(), atol=2e-3, rtol=2e-3)


def test_a_padded_batch_in_half_precision():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=128, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    model = transformers.BertModel(config).cuda().half().eval()
    ids = torch.randint(1, 97, (3, 200), device="cuda")
    mask = (torch.arange(200) < torch.tensor([[200], [77], [1]])).long().cuda()
    results = []
    for implementation in ("eager", "stof"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            results.append(model(ids, attention_mask=mask).last_hidden_state[mask.bool()])
    torch.testing.assert_close(*results, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("length", [2, 20])
def test_more_heads_than_a_grid_is_high(length):
    shape = (70_000, 1, length, 16)
    q, k, v = make(shape, shape, shape, dtype=torch.float16)
    mask = SparseMask.from_pattern(patterns.Causal(), length, device="cuda")
    out = stof_hf.attention(q, k, v, mask)
    want, _ = reference_attention(q, k, v, mask.to_dense())
    torch.testing.assert_close(out.double(), want, atol=3e-3, rtol=3e-3)
