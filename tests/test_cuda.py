"""The CUDA block-wise kernel against the fp64 oracle, on a Hopper GPU."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases

from stof_hf import SparseMask, attention, patterns
from stof_hf.attention import select
from stof_hf.attention.granules import Layout
from stof_hf.attention.reference import reference_attention

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_empty")]

# Items are split sooner than they pay.
LAYOUTS = {
    "rows": (Layout(2, False, merge_cost=1.0), False),
    "paired": (Layout(1, True, merge_cost=1.0), False),
    "heads": (Layout(1, False, merge_cost=1.0), True),
}
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def on_hopper():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the GPU is no Hopper GPU")


def make(batch, heads, kv_heads, q_len, kv_len, dim, dtype, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    shapes = (batch, q_len, heads, dim), (batch, kv_len, kv_heads, dim)
    q, k, v = (
        torch.randn(shapes[i], generator=g, device="cuda", dtype=dtype).transpose(1, 2)
        for i in (0, 1, 1)
    )
    return q, k, v


def forward(q, k, v, mask, layout, workers=8, sinks=None):
    from stof_hf.attention import cuda

    # What the kernel allocates comes from this memory: what it does not write shows.
    torch.full((1 << 22,), torch.nan, device="cuda")
    config = select.CudaConfig(*LAYOUTS[layout], workers, 1 << 18)
    call = cuda.BlockCall("hopper", q, k, v, mask, None, sinks, 0.2, 0.0, config)
    return call(q, k, v, mask, None, sinks)


def compare(q, k, v, mask, layout, workers=8, sinks=None):
    out, lse = forward(q, k, v, mask, layout, workers, sinks)
    want, want_lse = reference_attention(
        q, k, v, mask.to_dense(), scale=0.2, softcap=0.0, bias=None, sinks=sinks
    )
    near = {"atol": TOLERANCE[q.dtype], "rtol": TOLERANCE[q.dtype]}
    torch.testing.assert_close(out.transpose(1, 2).double(), want, **near)
    torch.testing.assert_close(lse.double(), want_lse, atol=2e-3, rtol=1e-3)


# HYPOTHESIS_PROFILE=thorough runs 10,000 of them.
@given(
    cases(max_heads=1), st.sampled_from(sorted(LAYOUTS)), st.sampled_from([64, 128]),
    st.sampled_from(sorted(TOLERANCE, key=str)), st.sampled_from([1, 8, 264]), st.booleans(),
)  # fmt: skip
def test_random_masks(case, layout, dim, dtype, workers, has_sinks):
    mask = case.mask().to("cuda")
    batch = max(mask.shape[0], 2)
    q, k, v = make(batch, 4, 2, case.q_len, case.kv_len, dim, dtype)
    sinks = torch.randn(4, device="cuda") if has_sinks else None
    if mask.shape[0] not in (1, batch):
        return
    compare(q, k, v, mask, layout, workers, sinks)


@pytest.mark.parametrize("layout", ["rows", "paired"])
def test_a_mask_per_head_and_batch(layout):
    def fn(b, h, q, k):
        return (q - k).abs() <= 20 * h + 50 * b

    mask = SparseMask.from_pattern(patterns.Custom(fn, 2, 4), 300, device="cuda")
    q, k, v = make(2, 4, 4, 300, 300, 64, torch.float16)
    compare(q, k, v, mask, layout)


@pytest.mark.parametrize(("dim", "layout"), product([64, 128], sorted(LAYOUTS)))
def test_long_rows_are_split_and_merged(dim, layout):
    pattern = patterns.Longformer(40, (0, 1, 700, 1999))
    mask = SparseMask.from_pattern(pattern, 2000, device="cuda")
    compare(*make(1, 4, 2, 2000, 2000, dim, torch.float16), mask, layout, workers=264)


def apart(b, h, q, k):
    """Two row tiles side by side see other keys, and each two stretches of them far apart."""
    even = q // 64 % 2 == 0
    near = (k // 16 % 3 == 0) & torch.where(even, k < 1000, k >= 1000)
    return near | (k // 16 == torch.where(even, 124, 0))


@pytest.mark.parametrize(("dim", "layout"), product([64, 128], sorted(LAYOUTS)))
def test_rows_of_a_block_that_see_other_keys(dim, layout):
    mask = SparseMask.from_pattern(patterns.Custom(apart), 2000, device="cuda")
    compare(*make(1, 4, 2, 2000, 2000, dim, torch.float16), mask, layout)


@pytest.mark.parametrize(("dim", "layout"), product([64, 128], sorted(LAYOUTS)))
@pytest.mark.parametrize("pattern", [patterns.Full(), patterns.BigBird(192)], ids=str)
def test_padding_of_many_steps(dim, layout, pattern):
    valid = torch.ones(2, 2000, dtype=torch.bool, device="cuda")
    valid[0, 200:1800] = valid[1, 900:] = False
    mask = SparseMask.from_pattern(pattern, 2000, padding=valid, device="cuda")
    compare(*make(2, 4, 2, 2000, 2000, dim, torch.float16), mask, layout)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_nothing_of_the_workspace_leaks_into_the_next_call(layout):
    mask = SparseMask.from_pattern(patterns.Causal(), 1000, device="cuda")
    first = make(2, 4, 2, 1000, 1000, 64, torch.float16)
    one = forward(*first, mask, layout)
    forward(*make(2, 4, 2, 1000, 1000, 64, torch.float16, 1), mask, layout)
    again = forward(*first, mask, layout)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))


@pytest.mark.parametrize(("dim", "kv_heads", "causal"), product([64, 128], [12, 4], [False, True]))
def test_where_cudnn_is_ahead(dim, kv_heads, causal, monkeypatch):
    monkeypatch.setattr(select, "cudnn_is_ahead", lambda *call: True)
    q, k, v = make(1, 12, kv_heads, 1100, 1100, dim, torch.float16)
    mask = SparseMask.from_pattern(patterns.Causal(), 1100, device="cuda") if causal else None
    options = {"bias": None, "sinks": None, "scale": 0.1, "softcap": 0.0}
    out, lse = select.forward(q, k, v, mask, **options)
    dense = mask.to_dense() if causal else None
    want, want_lse = reference_attention(q, k, v, dense, **options)
    assert out.is_contiguous()
    torch.testing.assert_close(out.transpose(1, 2).double(), want, atol=4e-3, rtol=4e-3)
    torch.testing.assert_close(lse.double(), want_lse, atol=2e-3, rtol=1e-3)


def test_strides_of_a_packed_projection():
    packed = torch.randn(2, 500, 3, 4, 64, device="cuda", dtype=torch.float16)
    q, k, v = (packed[:, :, i].transpose(1, 2) for i in range(3))
    mask = SparseMask.from_pattern(patterns.SlidingWindow(100, 0), 500, device="cuda")
    compare(q, k, v, mask, "rows")


def test_rows_that_are_not_aligned_are_computed_elsewhere():
    base = torch.randn(2, 4, 500 * 64 + 8, device="cuda", dtype=torch.float16)
    mask = SparseMask.from_pattern(patterns.Causal(), 500, device="cuda")
    aligned, shifted = (base[..., i : i + 500 * 64].view(2, 4, 500, 64) for i in (0, 1))
    for x in (aligned, shifted, aligned):
        out = attention(x, x, x, mask, scale=0.2)
        want, _ = reference_attention(
            x, x, x, mask.to_dense(), scale=0.2, softcap=0.0, bias=None, sinks=None
        )
        torch.testing.assert_close(out.double(), want, atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_without_logarithms_the_result_is_the_same(layout):
    from stof_hf.attention import cuda

    q, k, v = make(2, 4, 2, 1000, 1000, 64, torch.float16)
    mask = SparseMask.from_pattern(patterns.Longformer(40, (0, 1)), 1000, device="cuda")
    config = select.CudaConfig(*LAYOUTS[layout], 264)
    rest = "hopper", q, k, v, mask, None, None, 0.2, 0.0, config
    outs = [cuda.BlockCall(*rest, n)(q, k, v, mask, None, None) for n in (True, False)]
    assert torch.equal(outs[0][0], outs[1][0]) and outs[1][1] is None


@pytest.mark.parametrize("sharpness", [1, 2, 3, 5])
@pytest.mark.parametrize("dim, dtype", [(64, torch.float16), (128, torch.bfloat16)])
def test_errors_are_those_of_sdpa(dim, dtype, sharpness):
    """Also where few keys take most of the weight, and maxima that lag behind make a difference."""
    q, k, v = make(2, 4, 4, 1024, 1024, dim, dtype)
    mask = SparseMask.from_pattern(patterns.Longformer(64, (0, 1, 2)), 1024, device="cuda")
    dense, scale = mask.to_dense(), sharpness * dim**-0.5
    want, _ = reference_attention(q, k, v, dense, scale=scale, softcap=0.0, bias=None, sinks=None)
    sdpa = torch.nn.functional.scaled_dot_product_attention(q, k, v, dense, scale=scale)
    ours = attention(q, k, v, mask, scale=scale)
    mine, theirs = ((x.double() - want).square().mean().sqrt() for x in (ours, sdpa))
    assert mine <= 1.1 * theirs


def test_the_tensors_of_a_call_are_not_kept():
    mask = SparseMask.from_pattern(patterns.Causal(), 4096, device="cuda")
    q, k, v = make(4, 8, 8, 4096, 4096, 64, torch.float16)
    attention(q, k, v, mask)
    held = torch.cuda.memory_allocated()
    size = q.nbytes
    del q, k, v
    assert torch.cuda.memory_allocated() <= held - 3 * size


def test_works_in_a_cuda_graph_and_on_a_side_stream():
    mask = SparseMask.from_pattern(patterns.Causal(), 800, device="cuda")
    q, k, v = make(2, 4, 2, 800, 800, 64, torch.float16)
    want = attention(q, k, v, mask)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        assert torch.equal(attention(q, k, v, mask), want)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k, v, mask)
    out.zero_()
    graph.replay()
    assert torch.equal(out, want)
    assert "calls without lse" in mask.plans
