"""The triton backend against the fp64 oracle: compiled on a GPU, interpreted where there is none.

Triton decides when a kernel is decorated, so TRITON_INTERPRET=1 has to be set before the backend is
imported; conftest.py does so on machines without a GPU.
"""

from dataclasses import replace

import pytest
import torch
from compiling import without_a_gpu, wrong
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import PADDINGS, cases, padded

from stof_hf import RelativeBias, SparseMask, patterns
from stof_hf.attention import select
from stof_hf.attention.reference import reference_attention
from stof_hf.masks.traced import structure_of

triton_backend = pytest.importorskip("stof_hf.attention.triton", reason="Triton is not installed")

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(params=["block-wise", "row-wise"])
def kernel(request, monkeypatch):
    """Forces one of the two kernels, where the selection has a choice."""
    if request.param == "row-wise":
        monkeypatch.setattr(select, "use_row_wise", lambda q, dim, mask: True)
    else:
        monkeypatch.setattr(select, "DECODE_ROWS", 0)
    return request.param


def make(b, h, hkv, sq, sk, d, dv=None, dtype=torch.float32, transposed=True):
    out = []
    for i, shape in enumerate([(b, h, sq, d), (b, hkv, sk, d), (b, hkv, sk, dv or d)]):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(DEVICE, dtype)
        out.append(x.transpose(1, 2).contiguous().transpose(1, 2) if transposed else x)
    return out


def compare(q, k, v, mask, allowed, *, bias=None, sinks=None, scale=0.2, softcap=0.0):
    if mask is not None:
        mask = mask.to(DEVICE)
    rest = {"bias": bias, "sinks": sinks}
    rest = {n: None if x is None else x.to(DEVICE) for n, x in rest.items()}
    out, lse = triton_backend.forward(q, k, v, mask, scale=scale, softcap=softcap, **rest)
    if allowed is not None:
        allowed = allowed.to(DEVICE)
    want, want_lse = reference_attention(q, k, v, allowed, scale=scale, softcap=softcap, **rest)
    assert out.dtype == q.dtype and out.is_contiguous() and lse.dtype == torch.float32
    tolerance = TOLERANCE[q.dtype]
    near = {"atol": tolerance, "rtol": tolerance}
    torch.testing.assert_close(out.transpose(1, 2).double(), want, **near)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-4, rtol=1e-4)
    if allowed is not None and sinks is None:
        assert (out.transpose(1, 2)[~allowed.any(-1).expand(lse.shape)] == 0).all()


@pytest.mark.parametrize("length", [70, 700], ids=["whole", "split"])
def test_without_logarithms_the_result_is_the_same(kernel, length):
    q, k, v = make(1, 2, 2, length, length, 64, dtype=torch.float16)
    mask = SparseMask.from_pattern(patterns.Longformer(20, (0,)), length, device=DEVICE)
    rest = q, k, v, mask, None, None, 0.2, 0.0, False
    outs = [
        triton_backend.prepare(*rest, with_lse)(q, k, v, mask, None, None)[0]
        for with_lse in (True, False)
    ]
    assert torch.equal(*outs)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim, value_dim", [(64, 64), (16, 16), (20, 33), (128, 64), (256, 256)])
def test_head_sizes(kernel, dtype, dim, value_dim):
    q, k, v = make(1, 2, 2, 70, 130, dim, value_dim, dtype)
    mask = SparseMask.from_pattern(patterns.Longformer(20, (0,)), 70, 130, q_offset=60)
    compare(q, k, v, mask, mask.to_dense(), scale=dim**-0.5)


@pytest.mark.parametrize(
    "sq, sk", [(1, 1), (1, 200), (3, 65), (64, 64), (63, 129), (5, 192), (200, 70), (257, 257)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_lengths(kernel, sq, sk, masked):
    q, k, v = make(1, 2, 1, sq, sk, 32)
    mask = SparseMask.from_pattern(patterns.Causal(), sq, sk, q_offset=max(0, sk - sq))
    compare(q, k, v, *((mask, mask.to_dense()) if masked else (None, None)))


@pytest.mark.parametrize(
    "pattern",
    [
        patterns.SlidingWindow(10, 3),
        ~patterns.SlidingWindow(70, 70),
        patterns.BigBird(16, (0, 150), 1),
        patterns.Documents([i // 50 for i in range(200)]) & patterns.Causal(),
        patterns.GlobalTokens((5,)),
    ],
    ids=lambda p: type(p).__name__,
)
def test_patterns(kernel, pattern):
    mask = SparseMask.from_pattern(pattern, 200)
    compare(*make(1, 2, 2, 200, 200, 16), mask, mask.to_dense())


@pytest.mark.parametrize("mask_shape", [(2, 4), (1, 4), (2, 1)], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("padding", PADDINGS)
def test_batch_heads_and_padding(kernel, mask_shape, kv_heads, padding):
    compare(*make(2, 4, kv_heads, 70, 140, 16), *padded(mask_shape, padding))


@pytest.mark.parametrize("options", [
    {"softcap": 2.0},
    {"sinks": torch.tensor([0.3, -1.0, 2.0, 0.0])},
    {"bias": torch.linspace(-1, 1, 70 * 140).view(70, 140)},
    {"bias": torch.linspace(-1, 1, 2 * 140).view(2, 1, 1, 140), "softcap": 5.0},
    {"bias": torch.linspace(-1, 1, 4 * 70).view(1, 4, 70, 1).half(), "sinks": torch.ones(4)},
    {"scale": -0.4},
], ids=lambda o: "-".join(o))  # fmt: skip
@pytest.mark.parametrize("empty_rows", [False, True])
def test_options(kernel, options, empty_rows):
    g = torch.Generator().manual_seed(6)
    allowed = torch.rand(1, 1, 70, 140, generator=g) < (0.01 if empty_rows else 0.4)
    compare(*make(2, 4, 2, 70, 140, 16), SparseMask.from_dense(allowed), allowed, **options)


@pytest.mark.parametrize("q_len, kv_len", [(70, 140), (64, 64), (1, 140)])
def test_a_bias_by_distance_is_read_from_its_table(kernel, q_len, kv_len):
    g = torch.Generator().manual_seed(6)
    allowed = torch.rand(1, 1, q_len, kv_len, generator=g) < 0.4
    mask = SparseMask.from_dense(allowed).to(DEVICE)
    q, k, v = make(2, 4, 2, q_len, kv_len, 16)
    table = torch.randn(1, 4, q_len + kv_len - 1, generator=g).to(DEVICE)
    bias = RelativeBias(table, q_len)
    out, _ = triton_backend.forward(q, k, v, mask, bias=bias, scale=0.2)
    want, _ = reference_attention(q, k, v, allowed.to(DEVICE), scale=0.2, bias=bias.dense())
    torch.testing.assert_close(out.transpose(1, 2).double(), want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_unaligned_and_strided_inputs(kernel, transposed):
    q, k, v = make(1, 2, 2, 70, 70, 24, transposed=transposed)
    room = torch.full((1, 2, 71, 25), torch.nan, device=DEVICE)[:, :, 1:, 1:]
    room.copy_(k)
    wide = torch.full((1, 2, 70, 48), torch.nan, device=DEVICE)[..., ::2]
    wide.copy_(v)
    mask = SparseMask.from_pattern(patterns.Causal(), 70)
    compare(q, room, wide, mask, mask.to_dense())


@pytest.mark.parametrize("heads, kv_heads", [(3, 1), (6, 2), (71, 1)])
@pytest.mark.parametrize("q_len", [1, 5, 30])
def test_odd_groups(kernel, heads, kv_heads, q_len):
    mask = SparseMask.from_pattern(patterns.Causal(), q_len, 80, q_offset=80 - q_len)
    compare(*make(1, heads, kv_heads, q_len, 80, 16), mask, mask.to_dense())


@pytest.mark.parametrize("kv_len", [1024, 1030])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5])])
@pytest.mark.parametrize(
    "pattern",
    [patterns.Full(), patterns.Causal(), patterns.Dilated(500, 2), patterns.GlobalTokens((0, 1))],
    ids=lambda p: type(p).__name__,
)
def test_split_over_keys(kernel, monkeypatch, pattern, sinks, kv_len):
    monkeypatch.setattr(select, "multiprocessors", lambda device: 64)
    mask = SparseMask.from_pattern(pattern, 64, kv_len, q_offset=kv_len - 64).to(DEVICE)
    compare(*make(1, 1, 1, 64, kv_len, 16), mask, mask.to_dense(), sinks=sinks)
    (call,) = (c.call for c in mask.plans["triton calls"].values())
    if kernel == "row-wise":
        assert call.splits > 1
    elif pattern != patterns.GlobalTokens((0, 1)):
        assert call.split


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(
    "q_len, row, kv_len, col",
    [(1, 150, 151, 0), (3, 90, 93, 0), (1, 99, 60, 40), (3, 99, 64, 40), (3, 125, 128, 0)],
)
def test_decode_views(q_len, row, kv_len, col, on_device):
    mask = SparseMask.from_pattern(patterns.Longformer(30, (0,)) & patterns.Causal(), 200)
    starts = (torch.tensor([row]), torch.tensor([col])) if on_device else (row, col)
    view = mask.rows(starts[0], q_len, kv_len, starts[1])
    allowed = mask.to_dense()[:, :, row : row + q_len, col : col + kv_len]
    compare(*make(2, 4, 2, q_len, kv_len, 32), view, allowed)


@pytest.mark.parametrize("known", [True, False])
def test_decode_with_everything(known):
    pattern = patterns.Longformer(30, (0, 170)) & patterns.Causal()
    mask = SparseMask.from_pattern(pattern, 1, 300, q_offset=270)
    valid = torch.ones(2, 300, dtype=torch.bool)
    valid[1, :250] = False
    mask, allowed = mask.with_padding(valid), mask.to_dense() & valid[:, None, None]
    if not known:
        mask = replace(mask, plans={})
    q, k, v = make(2, 6, 2, 1, 300, 40, 24)
    bias, sinks = torch.randn(6, 1, 300), torch.randn(6)
    compare(q, k, v, mask, allowed, bias=bias, sinks=sinks, softcap=15.0)


def test_one_mask_serves_changing_offsets():
    mask = SparseMask.from_pattern(patterns.SlidingWindow(30, 0), 200).to(DEVICE)
    q, k, v = make(1, 2, 2, 1, 150, 16)
    for row in (3, 100, 149):
        view = mask.rows(torch.tensor([row], device=DEVICE), 1, 150)
        compare(q, k, v, view, mask.to_dense()[:, :, row : row + 1, :150])


def test_masked_scores_may_be_nan(kernel):
    q, k, v = make(1, 2, 2, 70, 140, 16)
    valid = torch.arange(140)[None] < 75
    k[:, :, 75:], v[:, :, 75:] = torch.nan, 0
    mask = SparseMask.from_pattern(patterns.Full(), 70, 140, padding=valid)
    out, _ = triton_backend.forward(q, k, v, mask.to(DEVICE), scale=0.25)
    want, _ = reference_attention(q, k[:, :, :75], v[:, :, :75], scale=0.25)
    torch.testing.assert_close(out.transpose(1, 2).double(), want, atol=2e-5, rtol=2e-5)


@settings(max_examples=15)
@given(cases(), st.sampled_from([16, 40]), st.sampled_from(list(TOLERANCE)), st.booleans())
def test_random_masks(case, dim, dtype, grouped):
    allowed = case.truth()
    batch, heads = (n if n > 1 else 2 for n in allowed.shape[:2])
    kv_heads = 1 if grouped else heads
    q, k, v = make(batch, heads, kv_heads, case.q_len, case.kv_len, dim, dtype=dtype)
    compare(q, k, v, case.mask(), allowed)
    # Without what the host knows of it, the mask is planned on the device.
    compare(q, k, v, replace(case.mask(), plans={}), allowed)
    bits_alone = structure_of(case.truth(padding=False))
    mask = SparseMask(case.q_len, case.kv_len, *bits_alone).with_padding(case.padding)
    compare(q, k, v, mask, allowed)


@pytest.mark.timeout(600)
def test_every_kernel_compiles_and_fits_into_shared_memory():
    """For GPUs that need not be here, with as many rows in a block as there can be."""
    cases = without_a_gpu("compile_triton.py")
    assert len(cases) == 78
    assert not wrong(cases), wrong(cases)


def test_lengths_and_batches_share_compiled_kernels():
    found = without_a_gpu("compile_triton.py", "keys")
    assert len(found) == 5
    assert all(set(kernels.values()) == {1} for _, kernels in found), found
