"""The CUDA block-wise kernel for GPUs from sm_80 on, against the fp64 oracle."""

import ctypes
from itertools import product
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases

from stof_hf import SparseMask, patterns
from stof_hf.attention import cuda_build, cuda_kernels
from stof_hf.attention.cuda import _PLAN, Problem, _Strides
from stof_hf.attention.granules import Layout, granule_plan
from stof_hf.attention.reference import reference_attention
from stof_hf.masks.bits import TILE

pytestmark = pytest.mark.gpu

FAMILY = cuda_kernels.Family(
    ("sm80.cu",),
    ("sm_80", "sm_86", "sm_89", "sm_120", "compute_80"),
    (32, 64, 80, 96, 128, 256),
    seconds=40,
)
LAYOUTS = {"rows": Layout(2, False), "paired": Layout(1, True), "heads": Layout(1, False)}
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
BIAS_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
STYLES = ("bshd", "bhsd", "packed", "shifted", "odd")


@pytest.fixture(scope="module", autouse=True)
def family():
    """The family among the others, all of it that this GPU uses built at once."""
    with mock.patch.dict(cuda_kernels.FAMILIES, {"sm80": FAMILY}):
        mine = cuda_kernels.all_kernels(torch.cuda.get_device_capability())
        cuda_build.build([one for one in mine if one.family == "sm80"])
        yield


def library(dim: int, q: torch.Tensor) -> ctypes.CDLL:
    return cuda_build.library("sm80", dim, q.dtype, q.device.index)


def compiled_dim(q: torch.Tensor, v: torch.Tensor) -> int:
    return min(dim for dim in FAMILY.head_dims if dim >= max(q.shape[3], v.shape[3]))


def pack(q, k, v, mask, layout, workers=8, bias=None, sinks=None, scale=0.2, softcap=0.0):
    """A Problem without outputs, and what it holds the addresses of."""
    heads, kv_heads = q.shape[1], k.shape[1]
    two_heads = layout == "heads" and heads // kv_heads % 2 == 0 and mask.pattern_id.shape[1] == 1
    copies = q.shape[0] * heads // (1 + two_heads)
    plan = granule_plan(mask, LAYOUTS[layout], copies, workers, 3)
    n_items, ids, valid = plan.items.shape[1], mask.pattern_id, mask.kv_valid
    p = Problem()
    for name, x in zip("qkv", (q, k, v), strict=True):
        setattr(p, name, _Strides(*x.stride()[:3]))
    p.query, p.key, p.value = q.data_ptr(), k.data_ptr(), v.data_ptr()
    p.batch, p.heads, p.q_len, p.head_dim = q.shape
    p.kv_heads, p.kv_len, p.value_dim = kv_heads, k.shape[2], v.shape[3]
    if valid is not None:
        p.kv_valid = valid.data_ptr()
        p.valid_batch = valid.shape[1] if len(valid) > 1 else 0
    if bias is not None:
        bias = bias.expand(*q.shape[:3], k.shape[2])
        p.bias, p.bias_dtype = bias.data_ptr(), BIAS_DTYPES[bias.dtype]
        p.bias_batch, p.bias_head, p.bias_row, p.bias_col = bias.stride()
    if sinks is not None:
        p.sinks = sinks.data_ptr()
    p.scale, p.softcap = scale, softcap
    p.grid, p.two_heads = min(workers, n_items * copies), two_heads
    p.device = q.device.index or 0
    p.workspace_bytes = p.batch * heads * plan.slots * TILE * (compiled_dim(q, v) + 2) * 4
    for name in _PLAN:
        setattr(p.plan, name, getattr(plan, name).data_ptr())
    p.plan.pattern_id = ids.data_ptr() if len(mask.row_ptr) > 1 else None
    p.plan.pattern_batch = ids.shape[1] if ids.shape[0] > 1 else 0
    p.plan.pattern_head = 1 if ids.shape[1] > 1 else 0
    p.plan.n_items, p.plan.n_merges = n_items, plan.merges.shape[1]
    p.plan.n_queue, p.plan.slots = len(plan.queue) or n_items * copies, plan.slots
    if not len(plan.queue):
        p.plan.queue = None
    return p, (q, k, v, mask, plan, bias, sinks)


def run(kernels, p, kept, stream=None):
    """(out, lse); what the kernels do not write is NaN."""
    q = kept[0]

    def poisoned(*shape, dtype=torch.float32):
        return torch.full(shape, torch.nan, dtype=dtype, device=q.device)

    out = poisoned(p.batch, p.q_len, p.heads, p.value_dim, dtype=q.dtype)
    lse = poisoned(p.batch, p.heads, p.q_len)
    workspace = poisoned(p.workspace_bytes // 4)
    p.out, p.lse, p.workspace = out.data_ptr(), lse.data_ptr(), workspace.data_ptr() or None
    message = kernels.stof_run(ctypes.byref(p), stream)
    assert message is None, message
    return out, lse


def forward(q, k, v, mask, layout, **options):
    p, kept = pack(q, k, v, mask, layout, **options)
    stream = torch.cuda.current_stream().cuda_stream
    return run(library(compiled_dim(q, v), q), p, kept, stream)


def compare(q, k, v, mask, layout, forward=forward, **options):
    out, lse = forward(q, k, v, mask, layout, **options)
    options.pop("workers", None)
    want, want_lse = reference_attention(q, k, v, mask.to_dense(), **{"scale": 0.2, **options})
    near = {"atol": TOLERANCE[q.dtype], "rtol": TOLERANCE[q.dtype]}
    torch.testing.assert_close(out.transpose(1, 2).double(), want, **near)
    torch.testing.assert_close(lse.double(), want_lse, atol=2e-3, rtol=1e-3)


def make(style, dtype, batch, heads, rows, dim, seed=0, device="cuda"):
    """[B, H, S, D] in the middle of NaN: contiguous or transposed, one of three of a packed
    projection, an odd number of bytes off, or with rows an odd number of elements apart."""
    head, row = {
        "bshd": (dim, heads * dim), "bhsd": (rows * dim, dim), "packed": (dim, 3 * heads * dim),
        "shifted": (dim, heads * dim), "odd": (dim + 1, heads * (dim + 1) + 1 - heads % 2),
    }[style]  # fmt: skip
    strides = (max(head * heads, row * rows), head, row, 1)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, heads, rows, dim, generator=g).to(device, dtype)
    memory = torch.full((batch * strides[0] + 64,), torch.nan, dtype=dtype, device=device)
    view = memory.as_strided(x.shape, strides, 33 if style == "shifted" else 32)
    return view.copy_(x)


dims = st.sampled_from([32, 64, 64, 80, 96, 128, 128, 256, 8, 40, 72, 100, 160, 192, 33])


@st.composite
def calls(draw):
    """Everything a call is made of but where its tensors lie."""
    case = draw(cases(max_heads=3))
    mask = case.mask()
    pattern_heads, batch = mask.pattern_id.shape[1], max(mask.shape[0], draw(st.integers(1, 2)))
    heads, kv_heads = draw(st.sampled_from([(4, 2), (4, 4), (6, 1), (3, 1)]))
    if pattern_heads > 1:
        heads, kv_heads = pattern_heads, draw(st.sampled_from([1, pattern_heads]))
    dim = draw(dims)
    value_dim = draw(st.one_of(st.just(dim), dims))
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
        options["bias"] = torch.randn(shape).to(draw(st.sampled_from(list(BIAS_DTYPES))))
    shapes = (
        (batch, heads, case.q_len, dim), (batch, kv_heads, case.kv_len, dim),
        (batch, kv_heads, case.kv_len, value_dim),
    )  # fmt: skip
    styles = [draw(st.sampled_from(STYLES[:3]))] * 3
    if draw(st.integers(0, 3)) == 0:
        styles = [draw(st.sampled_from(STYLES)) for _ in range(3)]
    return mask, shapes, styles, draw(st.sampled_from(list(TOLERANCE))), options


def check(call, layout, forward=forward, device="cuda"):
    mask, shapes, styles, dtype, options = call
    if mask.shape[0] not in (1, shapes[0][0]):
        return
    tensors = [
        make(style, dtype, *shape, seed=i, device=device)
        for i, (style, shape) in enumerate(zip(styles, shapes, strict=True))
    ]
    options = {
        name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()
    }
    compare(*tensors, mask.to(device), layout, forward, **options)


# HYPOTHESIS_PROFILE=thorough runs 10,000 of them.
@given(calls(), st.sampled_from(sorted(LAYOUTS)))
def test_random_calls(call, layout):
    check(call, layout)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("dim", "layout"), product(FAMILY.head_dims, sorted(LAYOUTS)))
def test_long_rows_are_split_and_merged(dim, layout, dtype):
    mask = SparseMask.from_pattern(patterns.Longformer(40, (0, 1, 700, 1999)), 2000, device="cuda")
    q = make("bshd", dtype, 1, 4, 2000, dim)
    k, v = (make("bshd", dtype, 1, 2, 2000, dim, seed) for seed in (1, 2))
    assert pack(q, k, v, mask, layout, workers=264)[0].plan.slots > 0
    compare(q, k, v, mask, layout, workers=264)


@pytest.mark.parametrize(("dim", "layout"), product([64, 128, 256], sorted(LAYOUTS)))
def test_long_runs_of_full_tiles(dim, layout):
    mask = SparseMask.from_pattern(patterns.Causal(), 1500, 1700, q_offset=200, device="cuda")
    q = make("packed", torch.float16, 2, 4, 1500, dim)
    k, v = (make("packed", torch.float16, 2, 2, 1700, dim, seed) for seed in (1, 2))
    compare(q, k, v, mask, layout)
    compare(q, k, v, mask, layout, softcap=20.0, bias=torch.randn(4, 1, 1700, device="cuda"))


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_padded_steps_are_left_out(layout):
    at = torch.arange(1000, device="cuda")
    valid = torch.stack([at < 130, at >= 900, at % 3 == 0, at < 0])
    mask = SparseMask.from_pattern(patterns.Causal(), 1000, device="cuda", padding=valid)
    q = make("bshd", torch.float16, 4, 4, 1000, 64)
    k, v = (make("bshd", torch.float16, 4, 2, 1000, 64, seed) for seed in (1, 2))
    compare(q, k, v, mask, layout)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_the_same_call_gives_the_same_bits(layout):
    mask = SparseMask.from_pattern(patterns.Longformer(40, (0, 1)), 1000, device="cuda")
    tensors = [make("bshd", torch.float16, 2, 4, 1000, 64, seed) for seed in range(3)]
    one, again = (forward(*tensors, mask, layout, workers=264) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))


def test_offsets_beyond_32_bits():
    """Rows of a tensor of more than 2^31 elements."""
    rows, far = 300, 2**31 // 300 + 64
    memory = torch.empty(rows * far, dtype=torch.float16, device="cuda")
    x = memory.as_strided((1, 1, rows, 64), (0, 0, far, 1))
    x.copy_(torch.randn(rows, 64))
    mask = SparseMask.from_pattern(patterns.Causal(), rows, device="cuda")
    compare(x, x, x, mask, "rows")


def test_what_it_does_not_compute_is_refused():
    mask = SparseMask.from_pattern(patterns.Causal(), 100, device="cuda")
    q, k, v = (make("bshd", torch.float16, 1, 1, 100, 80, seed) for seed in range(3))
    p, kept = pack(q, k, v, mask, "rows")
    message = library(64, q).stof_run(ctypes.byref(p), None)
    assert b"next larger" in message
    p.bias, p.bias_dtype = q.data_ptr(), 7
    assert b"float32, float16 or bfloat16" in library(80, q).stof_run(ctypes.byref(p), None)
