"""The CUDA block-wise kernel for GPUs from sm_80 on, against the fp64 oracle."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases

from stof_hf import RelativeBias, SparseMask, attention, patterns
from stof_hf.attention import cuda, select
from stof_hf.attention.granules import Layout
from stof_hf.attention.reference import reference_attention
from stof_hf.kernels.cuda_kernels import FAMILIES

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_empty")]

DEVICE = "cuda"
DIMS = FAMILIES["sm80"].head_dims
# Items are split sooner than they pay.
LAYOUTS = {
    "rows": Layout(2, False, merge_cost=1.0),
    "paired": Layout(1, True, merge_cost=1.0),
    "heads": Layout(1, False, merge_cost=1.0),
}
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
BIAS_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STYLES = ("bshd", "bhsd", "packed", "shifted", "odd")

each_layout = pytest.mark.parametrize("layout", sorted(LAYOUTS))


def make(style, dtype, batch, heads, rows, dim, seed=0):
    """[B, H, S, D] in the middle of NaN: contiguous or transposed, one of three of a packed
    projection, an odd number of bytes off, or with rows an odd number of elements apart."""
    head, row = {
        "bshd": (dim, heads * dim), "bhsd": (rows * dim, dim), "packed": (dim, 3 * heads * dim),
        "shifted": (dim, heads * dim), "odd": (dim + 1, heads * (dim + 1) + 1 - heads % 2),
    }[style]  # fmt: skip
    strides = (max(head * heads, row * rows), head, row, 1)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, heads, rows, dim, generator=g).to(DEVICE, dtype)
    memory = torch.full((batch * strides[0] + 64,), torch.nan, dtype=dtype, device=DEVICE)
    return memory.as_strided(x.shape, strides, 33 if style == "shifted" else 32).copy_(x)


def tensors(batch, heads, kv_heads, q_len, kv_len, dim, dtype=torch.float16, style="bshd"):
    q = make(style, dtype, batch, heads, q_len, dim)
    return q, *(make(style, dtype, batch, kv_heads, kv_len, dim, seed) for seed in (1, 2))


def prepared(q, k, v, mask, layout, workers=8, bias=None, sinks=None, scale=0.2, softcap=0.0):
    group = q.shape[1] // k.shape[1]
    two_heads = layout == "heads" and group % 2 == 0 and mask.pattern_id.shape[1] == 1
    config = select.CudaConfig(LAYOUTS[layout], two_heads, workers, 1 << 18)
    return cuda.BlockCall("sm80", q, k, v, mask, bias, sinks, scale, softcap, config)


def forward(q, k, v, mask, layout, bias=None, sinks=None, **options):
    call = prepared(q, k, v, mask, layout, bias=bias, sinks=sinks, **options)
    # The workspace comes from this memory: what the kernel does not write shows.
    torch.full((1 << 22,), torch.nan, device=DEVICE)
    return call(q, k, v, mask, bias, sinks)


def reference(q, k, v, mask, bias=None, sinks=None, scale=0.2, softcap=0.0):
    dense = mask.to_dense()
    return reference_attention(q, k, v, dense, scale=scale, softcap=softcap, bias=bias, sinks=sinks)


def check_close(out, lse, q, k, v, mask, **options):
    want, want_lse = reference(q, k, v, mask, **options)
    near = {"atol": TOLERANCE[q.dtype], "rtol": TOLERANCE[q.dtype]}
    torch.testing.assert_close(out.transpose(1, 2).double(), want, **near)
    torch.testing.assert_close(lse.double(), want_lse, atol=2e-3, rtol=1e-3)


def compare(q, k, v, mask, layout, workers=8, **options):
    out, lse = forward(q, k, v, mask, layout, workers=workers, **options)
    check_close(out, lse, q, k, v, mask, **options)


@st.composite
def calls(draw):
    """A mask, shapes, where tensors lie, and options."""
    case = draw(cases(max_heads=3))
    mask = case.mask()
    batch = max(mask.shape[0], draw(st.integers(1, 2)))
    pattern_heads = mask.pattern_id.shape[1]
    heads, kv_heads = draw(st.sampled_from([(4, 2), (4, 4), (6, 1), (3, 1)]))
    if pattern_heads > 1:
        heads, kv_heads = pattern_heads, draw(st.sampled_from([1, pattern_heads]))
    dims = [draw(st.sampled_from(DIMS))] * 2
    if draw(st.integers(0, 5)) == 0:
        # Another head size of the values, or of the queries: the kernel of the larger serves.
        dims[draw(st.integers(0, 1))] = draw(st.integers(1, dims[0]))
    shapes = (
        (batch, heads, case.q_len, dims[0]), (batch, kv_heads, case.kv_len, dims[0]),
        (batch, kv_heads, case.kv_len, dims[1]),
    )  # fmt: skip
    options = {
        "workers": draw(st.sampled_from([1, 8, 264])),
        "softcap": draw(st.sampled_from([0.0, 0.0, 5.0])),
        "scale": draw(st.sampled_from([0.2, 0.2, 0.2, -0.1, 0.0])),
    }
    if draw(st.booleans()):
        options["sinks"] = torch.randn(heads)
    if draw(st.integers(0, 2)) == 0:
        full = (batch, heads, case.q_len, case.kv_len)
        shape = [n if draw(st.booleans()) else 1 for n in full]
        options["bias"] = torch.randn(shape).to(draw(st.sampled_from(BIAS_DTYPES)))
    styles = [draw(st.sampled_from(STYLES[:3]))] * 3
    if draw(st.integers(0, 3)) == 0:
        styles = [draw(st.sampled_from(STYLES)) for _ in range(3)]
    return mask, shapes, styles, draw(st.sampled_from(list(TOLERANCE))), options


# HYPOTHESIS_PROFILE=thorough runs 10,000 of them.
@given(calls(), st.sampled_from(sorted(LAYOUTS)))
def test_random_calls(call, layout):
    mask, shapes, styles, dtype, options = call
    if mask.shape[0] not in (1, shapes[0][0]):
        return
    q, k, v = (
        make(style, dtype, *shape, seed=seed)
        for seed, (style, shape) in enumerate(zip(styles, shapes, strict=True))
    )
    on_device = {
        name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()
    }
    compare(q, k, v, mask.to(DEVICE), layout, **on_device)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("dim", "layout"), product(DIMS, sorted(LAYOUTS)))
def test_long_rows_are_split_and_merged(dim, layout, dtype):
    mask = SparseMask.from_pattern(patterns.Longformer(40, (0, 1, 700, 1999)), 2000, device=DEVICE)
    q, k, v = tensors(1, 4, 2, 2000, 2000, dim, dtype)
    assert prepared(q, k, v, mask, layout, workers=264).problem.plan.slots > 0
    compare(q, k, v, mask, layout, workers=264, sinks=torch.randn(4, device=DEVICE))


@pytest.mark.parametrize(("dim", "layout"), product(DIMS, sorted(LAYOUTS)))
def test_long_runs_of_full_tiles(dim, layout):
    mask = SparseMask.from_pattern(patterns.Causal(), 1100, 1300, q_offset=200, device=DEVICE)
    q, k, v = tensors(2, 4, 2, 1100, 1300, dim, style="packed")
    for workers in (8, 264):
        compare(q, k, v, mask, layout, workers=workers)
    compare(q, k, v, mask, layout, softcap=20.0, bias=torch.randn(4, 1, 1300, device=DEVICE)[None])


@each_layout
def test_padding_on_the_right_on_the_left_with_holes_and_everywhere(layout):
    at = torch.arange(1000, device=DEVICE)
    valid = torch.stack([at < 130, at >= 900, at % 3 == 0, at < 0])
    mask = SparseMask.from_pattern(patterns.Causal(), 1000, device=DEVICE, padding=valid)
    for dim, options in ((64, {}), (80, {"softcap": 10.0}), (256, {})):
        compare(*tensors(4, 4, 2, 1000, 1000, dim), mask, layout, **options)


@each_layout
def test_a_mask_per_head_and_batch(layout):
    def fn(b, h, q, k):
        return (q - k).abs() <= 20 * h + 50 * b

    mask = SparseMask.from_pattern(patterns.Custom(fn, 2, 4), 300, device=DEVICE)
    compare(*tensors(2, 4, 2, 300, 300, 96), mask, layout)


@each_layout
@pytest.mark.parametrize("dim", [64, 256])
def test_rows_without_a_key(layout, dim):
    def fn(b, h, q, k):
        return (k < 200) & (q % 3 == 0) & (q < 200)

    mask = SparseMask.from_pattern(patterns.Custom(fn), 300, 250, device=DEVICE)
    q, k, v = tensors(1, 4, 2, 300, 250, dim)
    empty = torch.arange(300, device=DEVICE)
    empty = (empty % 3 > 0) | (empty >= 200)
    for softcap in (0.0, 10.0):
        out, lse = forward(q, k, v, mask, layout, softcap=softcap)
        assert (out[:, empty] == 0).all() and (lse[:, :, empty] == -torch.inf).all()
        assert out.isfinite().all() and lse[:, :, ~empty].isfinite().all()
    sinks = torch.randn(4, device=DEVICE)
    out, lse = forward(q, k, v, mask, layout, sinks=sinks)
    assert (out[:, empty] == 0).all()
    torch.testing.assert_close(lse[0, :, empty], sinks[:, None].expand(-1, int(empty.sum())))


@pytest.mark.parametrize("dtype", BIAS_DTYPES, ids=str)
def test_every_form_of_bias(dtype):
    mask = SparseMask.from_pattern(patterns.Longformer(70, (3,)), 250, 330, device=DEVICE)
    q, k, v = tensors(2, 4, 2, 250, 330, 64)
    full = (2, 4, 250, 330)
    for kept in product((False, True), repeat=4):
        shape = [n if keep else 1 for n, keep in zip(full, kept, strict=True)]
        bias = torch.randn(shape, device=DEVICE).to(dtype)
        compare(q, k, v, mask, "rows", bias=bias)
    bias = torch.randn(2, 330, 4, 251, device=DEVICE).to(dtype)[..., 1:].permute(0, 2, 3, 1)
    bias[:, :, 3] = -torch.inf
    compare(q, k, v, mask, "rows", bias=bias)


def test_a_bias_by_distance():
    mask = SparseMask.from_pattern(patterns.Longformer(70, (3,)), 250, 330, device=DEVICE)
    q, k, v = tensors(2, 4, 2, 250, 330, 64)
    bias = RelativeBias(torch.randn(1, 4, 579, device=DEVICE), 250)
    out, lse = prepared(q, k, v, mask, "rows", bias=bias)(q, k, v, mask, bias, None)
    want, want_lse = reference(q, k, v, mask, bias=bias.dense())
    torch.testing.assert_close(out.transpose(1, 2).double(), want, atol=4e-3, rtol=4e-3)
    torch.testing.assert_close(lse.double(), want_lse, atol=4e-3, rtol=4e-3)


@each_layout
@pytest.mark.parametrize("dim", DIMS)
def test_rows_of_any_alignment(dim, layout):
    mask = SparseMask.from_pattern(patterns.SlidingWindow(90, 20), 260, device=DEVICE)
    for style in ("shifted", "odd"):
        compare(*tensors(2, 4, 2, 260, 260, dim, torch.bfloat16, style), mask, layout)


@each_layout
def test_the_same_call_gives_the_same_bits(layout):
    mask = SparseMask.from_pattern(patterns.Longformer(40, (0, 1)), 1000, device=DEVICE)
    q, k, v = tensors(2, 4, 2, 1000, 1000, 64)
    one = forward(q, k, v, mask, layout, workers=264)
    forward(v.repeat(1, 2, 1, 1), q[:, :2], k, mask, layout, workers=264)
    again = forward(q, k, v, mask, layout, workers=264)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("dim", "layout"), product(DIMS, sorted(LAYOUTS)))
def test_errors_are_those_of_sdpa(dim, layout, dtype):
    mask = SparseMask.from_pattern(patterns.Longformer(64, (0, 1, 2)), 1024, device=DEVICE)
    q, k, v = tensors(1, 4, 4, 1024, 1024, dim, dtype)
    dense, scale = mask.to_dense(), dim**-0.5
    bias = torch.randn(1, 4, 1024, 1024, device=DEVICE).to(dtype)
    for extra in (None, bias):
        want, _ = reference(q, k, v, mask, scale=scale, bias=extra)
        given = dense if extra is None else extra.masked_fill(~dense, -torch.inf)
        sdpa = torch.nn.functional.scaled_dot_product_attention(q, k, v, given)
        ours = forward(q, k, v, mask, layout, scale=scale, bias=extra)[0].transpose(1, 2)
        mine, theirs = ((x.double() - want).square().mean().sqrt() for x in (ours, sdpa))
        assert mine <= 1.1 * theirs


@pytest.mark.parametrize("far", [2**31 // 290 // 8 * 8, 2**31 // 290 | 1], ids=["aligned", "odd"])
def test_offsets_beyond_31_bits(far):
    x = torch.zeros(300 * far, dtype=torch.float16, device=DEVICE)
    x = x.as_strided((1, 1, 300, 64), (0, 0, far, 1)).copy_(torch.randn(300, 64))
    mask = SparseMask.from_pattern(patterns.Causal(), 300, device=DEVICE)
    compare(x, x, x, mask, "rows")


def test_the_op_takes_it_for_what_the_hopper_kernel_does_not_compute(monkeypatch):
    monkeypatch.setattr(select, "block_kernel", lambda able, *_: able[-1])
    mask = SparseMask.from_pattern(patterns.Longformer(50, (0,)), 500, device=DEVICE)
    bias = torch.randn(4, 500, 500, device=DEVICE)
    base = torch.randn(2, 4, 500 * 64 + 8, device=DEVICE, dtype=torch.float16)
    aligned, shifted = (base[..., i : i + 500 * 64].view(2, 4, 500, 64) for i in (0, 1))
    for x, options in (
        (aligned, {}), (shifted, {}), (aligned, {"softcap": 30.0}), (aligned, {"bias": bias}),
        (aligned[..., :32], {"sinks": torch.randn(4, device=DEVICE, dtype=torch.float16)}),
    ):  # fmt: skip
        out = attention(x, x, x, mask, scale=0.2, **options)
        want, _ = reference(x, x, x, mask, **options)
        torch.testing.assert_close(out.double(), want, atol=4e-3, rtol=4e-3)
    made = [call.call for call in mask.plans["calls without lse"].values()]
    assert [type(call) for call in made] == [cuda.BlockCall] * 5


def test_works_in_a_cuda_graph_and_on_a_side_stream():
    mask = SparseMask.from_pattern(patterns.Longformer(50, (0, 1)), 1500, device=DEVICE)
    q, k, v = tensors(2, 4, 2, 1500, 1500, 96)
    call = prepared(q, k, v, mask, "rows", workers=264)
    want = call(q, k, v, mask, None, None)[0]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        out = call(q, k, v, mask, None, None)[0]
    side.synchronize()
    assert torch.equal(out, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(q, k, v, mask, None, None)[0]
    out.zero_()
    graph.replay()
    assert torch.equal(out, want)
