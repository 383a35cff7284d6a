"""The cpu backend, C++ and torch, against a dense softmax in fp64."""

import math

import pytest
import torch

from stof_hf.attention import cpu
from stof_hf.errors import MaskError
from stof_hf.masks import patterns
from stof_hf.masks.sparse_mask import SparseMask

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(params=["cpp", "torch"])
def attention(request, monkeypatch):
    """cpu.forward on each of its two paths."""
    if request.param == "torch":
        monkeypatch.setattr(cpu, "_library", lambda: None)
    elif cpu._library() is None:
        pytest.skip("no C++ compiler")
    return cpu.forward


def dense(q, k, v, allowed=None, *, bias=None, sinks=None, scale, softcap=0.0):
    """out fp64 [B, Sq, H, Dv] and lse fp64 [B, H, Sq]; masked keys are never multiplied."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.double() for x in (q, k, v))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * scale
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    if bias is not None:
        scores = scores + bias.double()
    if allowed is None:
        allowed = torch.ones(1, dtype=torch.bool)
    allowed = allowed.expand(scores.shape)
    scores = scores.masked_fill(~allowed, -math.inf)
    logits = scores
    if sinks is not None:
        column = sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        logits = torch.cat([scores, column], -1)
    lse = logits.logsumexp(-1)
    weights = logits.softmax(-1)[..., : k.shape[2]].masked_fill((lse == -math.inf)[..., None], 0)
    terms = weights[..., None] * v[:, :, None]
    out = terms.masked_fill(~allowed[..., None], 0).sum(-2)
    return out.transpose(1, 2), lse


def make(b, h, hkv, sq, sk, d, dv=None, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(b, h, sq, d), (b, hkv, sk, d), (b, hkv, sk, dv or d)]
    return [torch.randn(s, generator=g).to(dtype) for s in shapes]


def random_mask(*shape, density=0.3, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def check(result, expected, dtype=torch.float32):
    out, lse = result
    want_out, want_lse = expected
    assert out.dtype == dtype and out.is_contiguous() and lse.dtype == torch.float32
    tol = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), want_out, atol=tol, rtol=tol, equal_nan=True)
    lse_tol = 1e-5 if dtype == torch.float32 else 1e-4
    torch.testing.assert_close(lse.double(), want_lse, atol=lse_tol, rtol=lse_tol, equal_nan=True)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "sq, sk, d, dv",
    [
        (1, 1, 64, 64),
        (1, 333, 64, 64),
        (3, 200, 80, 80),
        (13, 65, 32, 32),
        (63, 63, 64, 64),
        (130, 130, 128, 128),
        (257, 190, 20, 7),
        (70, 300, 256, 256),
        (65, 64, 1, 1),
        (40, 129, 65, 33),
    ],
)
def test_lengths_and_head_sizes(attention, dtype, sq, sk, d, dv):
    q, k, v = make(1, 2, 2, sq, sk, d, dv, dtype)
    allowed = random_mask(1, 1, sq, sk)
    scale = d**-0.5
    check(attention(q, k, v, None, scale=scale), dense(q, k, v, scale=scale), dtype)
    mask = SparseMask.from_dense(allowed)
    check(attention(q, k, v, mask, scale=scale), dense(q, k, v, allowed, scale=scale), dtype)


@pytest.mark.parametrize(
    "pattern",
    [
        patterns.Causal(),
        patterns.SlidingWindow(10, 3),
        patterns.Longformer(8, (0, 100, 101)),
        ~patterns.SlidingWindow(70, 70),
    ],
    ids=lambda p: type(p).__name__,
)
@pytest.mark.parametrize("n", [5, 64, 201, 320])
def test_patterns(attention, pattern, n):
    q, k, v = make(2, 3, 3, n, n, 32)
    mask = SparseMask.from_pattern(pattern, n)
    want = dense(q, k, v, mask.to_dense(), scale=0.3)
    check(attention(q, k, v, mask, scale=0.3), want)


@pytest.mark.parametrize("shape", [(2, 4), (1, 4), (2, 1)], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_mask_per_batch_and_head_with_grouped_queries(attention, shape, kv_heads):
    q, k, v = make(2, 4, kv_heads, 100, 150, 16)
    allowed = random_mask(*shape, 100, 150)
    mask = SparseMask.from_dense(allowed)
    want = dense(q, k, v, allowed, scale=0.25)
    check(attention(q, k, v, mask, scale=0.25), want)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_strided_inputs_are_read_in_place(attention, dtype):
    fused = torch.randn(2, 90, 3, 4, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    q, k, v = (fused[:, :, i].transpose(1, 2) for i in range(3))
    q = q[:, :, 7:60]
    allowed = random_mask(1, 1, 53, 90)
    want = dense(q, k, v, allowed, scale=0.2)
    check(attention(q, k, v, SparseMask.from_dense(allowed), scale=0.2), want, dtype)
    columns = v.mT.contiguous().mT
    check(attention(q, k, columns, SparseMask.from_dense(allowed), scale=0.2), want, dtype)


def test_rows_without_a_key_give_zeros(attention):
    q, k, v = make(1, 2, 2, 150, 150, 32)
    allowed = random_mask(1, 1, 150, 150)
    allowed[..., [0, 63, 64, 149], :] = False
    allowed[..., 70:140, :] = False
    out, lse = attention(q, k, v, SparseMask.from_dense(allowed), scale=0.2)
    empty = ~allowed[0, 0].any(-1)
    assert (out[:, empty] == 0).all() and (lse[..., empty] == -math.inf).all()
    check((out, lse), dense(q, k, v, allowed, scale=0.2))


@pytest.mark.parametrize("side", ["right", "left", "holes", "everything"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_padding_hides_even_nan(attention, side, dtype):
    n = 140
    valid = torch.ones(2, n, dtype=torch.bool)
    if side == "right":
        valid[0, 77:] = False
    elif side == "left":
        valid[1, :65] = False
    elif side == "holes":
        valid = random_mask(2, n, density=0.6)
    else:
        valid[1] = False
    q, k, v = make(2, 2, 1, n, n, 32, dtype=dtype)
    mask = SparseMask.from_pattern(patterns.Causal(), n).with_padding(valid)
    want = dense(q, k, v, mask.to_dense(), scale=0.2)
    hidden = ~valid[:, None, :, None]
    k, v = k.masked_fill(hidden, math.nan), v.masked_fill(hidden, math.inf)
    check(attention(q, k, v, mask, scale=0.2), want, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_value_reaches_only_the_rows_that_see_it(attention, dtype, poison):
    q, k, v = make(1, 2, 2, 130, 130, 32, dtype=dtype)
    k[:, :, 40], v[:, :, 100] = poison, poison
    mask = SparseMask.from_pattern(patterns.Causal(), 130)
    out, _ = attention(q, k, v, mask, scale=0.2)
    clean, _ = attention(
        q[:, :, :40],
        k[:, :, :40],
        v[:, :, :40],
        SparseMask.from_pattern(patterns.Causal(), 40),
        scale=0.2,
    )
    torch.testing.assert_close(out[:, :40], clean, atol=1e-2, rtol=0)
    assert not out[:, 100:].isfinite().any()


def test_nan_in_a_visible_key_is_not_hidden(attention):
    q, k, v = make(1, 1, 1, 80, 80, 32)
    k[:, :, 3] = math.nan
    out, lse = attention(q, k, v, None, scale=0.2)
    assert out.isnan().all() and lse.isnan().all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sq", [2, 100])
@pytest.mark.parametrize("options", ["sinks", "softcap", "bias", "sinks softcap bias"])
def test_score_options(attention, dtype, sq, options):
    q, k, v = make(2, 4, 2, sq, 100, 32, dtype=dtype)
    g = torch.Generator().manual_seed(3)
    given = {}
    if "sinks" in options:
        given["sinks"] = torch.randn(4, generator=g)
    if "softcap" in options:
        given["softcap"] = 2.5
    if "bias" in options:
        given["bias"] = torch.randn(1, 4, sq, 100, generator=g)
    allowed = random_mask(1, 1, sq, 100)
    allowed[..., -1, :] = False
    want = dense(q, k, v, allowed, scale=0.7, **given)
    check(attention(q, k, v, SparseMask.from_dense(allowed), scale=0.7, **given), want, dtype)


@pytest.mark.parametrize(
    "shape", [(2, 1, 1, 90), (1, 3, 70, 1), (3, 1, 90), (70, 90), (1, 1, 70, 90), (1,)], ids=str
)
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_bias_broadcasts(attention, shape, bias_dtype):
    q, k, v = make(2, 3, 3, 70, 90, 16)
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(bias_dtype)
    want = dense(q, k, v, bias=bias, scale=0.2)
    check(attention(q, k, v, None, bias=bias, scale=0.2), want)
    expanded = bias.expand(2, 3, 70, 90)
    check(attention(q, k, v, None, bias=expanded, scale=0.2), want)


def test_bias_of_the_lowest_number_and_of_minus_infinity(attention):
    q, k, v = make(1, 2, 2, 70, 90, 16)
    bias = torch.zeros(1, 1, 70, 90)
    bias[..., 50:] = torch.finfo(torch.float32).min
    bias[:, :, 10] = torch.finfo(torch.float32).min
    bias[:, :, 20] = -math.inf
    want_out, want_lse = dense(q, k, v, bias=bias, scale=0.2)
    out, lse = attention(q, k, v, None, bias=bias, scale=0.2)
    torch.testing.assert_close(out.double(), want_out, atol=1e-5, rtol=1e-5)
    assert (out[:, 20] == 0).all() and (lse[..., 20] == -math.inf).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "row, col, q_len, kv_len",
    [(150, 0, 1, 151), (63, 0, 3, 66), (64, 64, 64, 128), (37, 21, 100, 111), (10, 70, 80, 50)],
)
@pytest.mark.parametrize("as_tensor", [False, True], ids=["int", "tensor"])
def test_decode_views(attention, dtype, row, col, q_len, kv_len, as_tensor):
    allowed = random_mask(1, 2, 210, 200, density=0.5)
    allowed[..., 64:128, :64] = True
    allowed[..., 128:, :] = False
    allowed[..., 128:, ::3] = True
    storage = SparseMask.from_dense(allowed)
    start = (torch.tensor([row]), torch.tensor([col])) if as_tensor else (row, col)
    view = storage.rows(start[0], q_len, kv_len, start[1])
    q, k, v = make(2, 2, 2, q_len, kv_len, 32, dtype=dtype)
    part = allowed[..., row : row + q_len, col : col + kv_len]
    check(attention(q, k, v, view, scale=0.2), dense(q, k, v, part, scale=0.2), dtype)
    valid = random_mask(2, kv_len, density=0.7)
    want = dense(q, k, v, part & valid[:, None, None], scale=0.2)
    check(attention(q, k, v, view.with_padding(valid), scale=0.2), want, dtype)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 3.0])
def test_scale_of_any_size_and_sign(attention, scale):
    q, k, v = make(1, 2, 2, 80, 80, 32)
    check(attention(q, k, v, None, scale=scale), dense(q, k, v, scale=scale))


def test_offsets_beyond_32_bits(attention):
    try:
        # Only the pages of the two heads are ever touched.
        storage = torch.empty(2**31 + 4096, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("no address space for 4 GB")
    q, k, v = make(1, 2, 2, 70, 90, 32, dtype=torch.float16)
    far = []
    for i, x in enumerate((q, k, v)):
        strides = (0, 2**31 - 5760, 32, 1)
        far.append(storage.as_strided(x.shape, strides, storage_offset=i * 3000).copy_(x))
        want = dense(q, k, v, scale=0.2)
        given = [q, k, v]
        given[i] = far[i]
        check(attention(*given, None, scale=0.2), want, torch.float16)


def test_no_keys_and_no_queries(attention):
    q, k, v = make(1, 2, 2, 3, 0, 16)
    out, lse = attention(q, k, v, None, scale=1.0)
    assert (out == 0).all() and (lse == -math.inf).all()
    q, k, v = make(1, 2, 2, 0, 3, 16)
    assert attention(q, k, v, None, scale=1.0)[0].shape == (1, 0, 2, 16)


@pytest.mark.skipif(cpu._library() is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_result_does_not_depend_on_threads(dtype):
    # The global rows hold more than a 64th of the work and 32 tiles: they are split over keys.
    n = 64 * 40
    mask = SparseMask.from_pattern(patterns.Longformer(16, (0, 1300)), n)
    q, k, v = make(1, 2, 2, n, n, 32, dtype=dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(cpu.forward(q, k, v, mask, scale=0.2))
    finally:
        torch.set_num_threads(before)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])
    rows = slice(1280, 1344)
    allowed = mask.rows(1280, 64, n).to_dense()
    want = dense(q[:, :, rows], k, v, allowed, scale=0.2)
    check((results[0][0][:, rows].contiguous(), results[0][1][..., rows]), want, dtype)


@pytest.mark.skipif(cpu._library() is None, reason="no C++ compiler")
def test_threads_without_an_openmp_runtime(monkeypatch):
    monkeypatch.setattr(cpu, "openmp", lambda: 0)
    q, k, v = make(2, 4, 4, 300, 300, 64)
    check(cpu.forward(q, k, v, None, scale=0.1), dense(q, k, v, scale=0.1))


def test_a_view_outside_its_mask_is_refused(attention):
    q, k, v = make(1, 2, 2, 8, 8, 8)
    view = SparseMask.from_pattern(patterns.Causal(), 100).rows(torch.tensor([125]), 8, 8)
    with pytest.raises(MaskError, match="longer sequence"):
        attention(q, k, v, view, scale=1.0)
