"""Gradients on a CUDA GPU through the op: as near to fp64 as SDPA's, compiled, in graphs, equal."""

import pytest
import torch
import torch.nn.functional as F

import stof_hf
from stof_hf import SparseMask, patterns
from stof_hf.attention import gradients
from stof_hf.attention.reference import reference_attention

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("no_other_backward")]

PATTERNS = {
    "none": None,
    "causal": patterns.Causal(),
    "longformer": patterns.Longformer(32, (*range(32), 512)),
    "bigbird": patterns.BigBird(32, (0, 1), 2),
    "documents": patterns.Documents([i // 150 for i in range(1100)]) & patterns.Causal(),
    "heavy keys": patterns.SlidingWindow(40, 0) | patterns.GlobalKeys(tuple(range(64))),
}


def make(heads, kv_heads, q_len, kv_len, dim, dtype, batch=2):
    """q, k, v, and the gradient of the output [B, H, Sq, D]."""
    draw = torch.Generator("cuda").manual_seed(0)
    sizes = ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len), (heads, q_len))
    made = [
        torch.randn(batch, s, h, dim, generator=draw, device="cuda").to(dtype).transpose(1, 2)
        for h, s in sizes
    ]
    return [x.requires_grad_() for x in made[:3]], made[3]


def exact(inputs, upstream, allowed, **options):
    parts = [x.detach().double().requires_grad_() for x in inputs]
    out, _ = reference_attention(*parts, allowed, **options)
    return torch.autograd.grad(out, parts, upstream.double())


def errors(grads, wants):
    """Norms of the errors over the norms."""
    return [float((g.double() - w).norm() / w.norm()) for g, w in zip(grads, wants, strict=True)]


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("dim", [32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_are_as_near_as_those_of_sdpa(name, dim, dtype):
    inputs, upstream = make(8, 8, 1100, 1100, dim, dtype)
    mask = allowed = None
    if PATTERNS[name] is not None:
        mask = SparseMask.from_pattern(PATTERNS[name], 1100, device="cuda")
        allowed = mask.to_dense()
    wants = exact(inputs, upstream, allowed)
    ours = torch.autograd.grad(stof_hf.attention(*inputs, mask), inputs, upstream)
    out = F.scaled_dot_product_attention(*inputs, attn_mask=allowed)
    theirs = torch.autograd.grad(out, inputs, upstream)
    for mine, other in zip(errors(ours, wants), errors(theirs, wants), strict=True):
        assert mine <= 1.1 * other + 1e-5


@pytest.mark.parametrize("rows, warps, unit", [(64, 4, 0), (64, 4, 1), (128, 8, 0), (128, 8, 1)])
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("dim", [64, 128])
def test_all_tiles(monkeypatch, rows, warps, unit, kv_heads, dim):
    made = gradients.BackwardConfig(rows, warps, 2, unit, None, 264)
    monkeypatch.setattr(gradients, "config", lambda *_: made)
    inputs, upstream = make(8, kv_heads, 1000, 1100, dim, torch.float16)
    valid = torch.arange(1100, device="cuda") < torch.tensor([[1100], [333]], device="cuda")
    for name, pattern in PATTERNS.items():
        pattern = pattern or patterns.Full()
        mask = SparseMask.from_pattern(pattern, 1000, 1100, device="cuda", padding=valid)
        wants = exact(inputs, upstream, mask.to_dense())
        grads = torch.autograd.grad(stof_hf.attention(*inputs, mask), inputs, upstream)
        assert max(errors(grads, wants)) < 3e-3, name
        assert not grads[1][1, :, 333:].any() and not grads[2][1, :, 333:].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_softcap_and_sinks(dtype):
    inputs, upstream = make(8, 2, 500, 500, 64, dtype)
    sinks = torch.randn(8, device="cuda", requires_grad=True)
    mask = SparseMask.from_pattern(patterns.Longformer(50, (0,)), 500, device="cuda")
    more = sinks.detach().double().requires_grad_()
    parts = [x.detach().double().requires_grad_() for x in inputs]
    out, _ = reference_attention(*parts, mask.to_dense(), sinks=more, softcap=5.0)
    wants = torch.autograd.grad(out, [*parts, more], upstream.double())
    out = stof_hf.attention(*inputs, mask, sinks=sinks, softcap=5.0)
    grads = torch.autograd.grad(out, [*inputs, sinks], upstream)
    assert max(errors(grads, wants)) < (3e-3 if dtype == torch.float16 else 2e-5)


def test_heads_with_patterns_of_their_own():
    g = torch.Generator().manual_seed(0)
    allowed = (torch.rand(1, 8, 400, 400, generator=g) < 0.1).cuda()
    inputs, upstream = make(8, 2, 400, 400, 64, torch.float16)
    wants = exact(inputs, upstream, allowed)
    mask = SparseMask.from_dense(allowed)
    grads = torch.autograd.grad(stof_hf.attention(*inputs, mask), inputs, upstream)
    assert max(errors(grads, wants)) < 3e-3


@pytest.mark.parametrize("mode", ["eager", "default", "reduce-overhead"])
def test_equal_calls_give_equal_bits(mode):
    inputs, upstream = make(8, 2, 1100, 1100, 64, torch.bfloat16)
    mask = SparseMask.from_pattern(PATTERNS["heavy keys"], 1100, device="cuda")

    def call(q, k, v):
        return stof_hf.attention(q, k, v, mask) * 2

    if mode != "eager":
        torch._dynamo.reset()
        call = torch.compile(call, fullgraph=True, mode=mode)
    wants = exact(inputs, 2 * upstream, mask.to_dense())
    seen = []
    for _ in range(4):
        grads = torch.autograd.grad(call(*inputs), inputs, upstream)
        assert max(errors(grads, wants)) < 2e-2
        seen.append([g.clone() for g in grads])
    # What a graph captures finds a plan made on the device, the run before it one by the host.
    first, *rest = seen if mode != "reduce-overhead" else seen[1:]
    assert all(torch.equal(a, b) for later in rest for a, b in zip(later, first, strict=True))


def test_a_graph_replays_with_new_inputs():
    inputs, upstream = make(8, 2, 700, 700, 64, torch.float16)
    mask = SparseMask.from_pattern(patterns.Longformer(50, (0,)), 700, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = stof_hf.attention(*inputs, mask)
        torch.autograd.grad(out, inputs, upstream)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = stof_hf.attention(*inputs, mask)
        grads = torch.autograd.grad(out, inputs, upstream)
    for seed in range(2):
        torch.manual_seed(seed)
        with torch.no_grad():
            for x in (*inputs, upstream):
                x.normal_()
        graph.replay()
        assert max(errors(grads, exact(inputs, upstream, mask.to_dense()))) < 3e-3


def test_a_known_mask_does_not_synchronise():
    inputs, upstream = make(8, 2, 700, 700, 64, torch.float16)
    mask = SparseMask.from_pattern(patterns.Longformer(50, (0,)), 700, device="cuda")
    for debug in ("default", "error"):
        torch.cuda.set_sync_debug_mode(debug)
        try:
            torch.autograd.grad(stof_hf.attention(*inputs, mask), inputs, upstream)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_memory_follows_rows():
    """Beyond the gradients: two numbers a row, and what split blocks add up."""
    inputs, upstream = make(8, 8, 16384, 16384, 64, torch.float16, batch=1)
    mask = SparseMask.from_pattern(patterns.SlidingWindow(64, 64), 16384, device="cuda")
    out = stof_hf.attention(*inputs, mask)
    torch.autograd.grad(out, inputs, upstream, retain_graph=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    grads = torch.autograd.grad(out, inputs, upstream)
    extra = torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in grads)
    assert extra < 4 << 20
