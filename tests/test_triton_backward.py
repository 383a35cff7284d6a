"""Gradients by Triton against the fp64 oracle: compiled on a GPU, interpreted where there is none.

See test_triton.py for when Triton interprets.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from compiling import without_a_gpu, wrong
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import PADDINGS, cases, padded

import stof_hf
from stof_hf import SparseMask, patterns
from stof_hf.attention import backward as plain
from stof_hf.attention import gradients, plan
from stof_hf.attention.backward_plan import backward_plan, transposed
from stof_hf.attention.reference import reference_attention
from stof_hf.masks import bits
from stof_hf.masks.traced import structure_of

backend = pytest.importorskip("stof_hf.attention.triton_backward", reason="Triton is not installed")

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
#: Rows of a block, and whether runs of full tiles have a loop of their own.
TILES = [(64, 0), (64, 1), (128, 0), (128, 1)]
# The interpreter takes seconds for what a GPU does at once.
if DEVICE.type == "cpu":
    TILES = TILES[::3]


@pytest.fixture(params=TILES, ids=lambda p: f"{p[0]}-rows-unit-{p[1]}")
def tiles(request, monkeypatch):
    use_tiles(monkeypatch, *request.param)


def use_tiles(monkeypatch, rows, unit, workers=8):
    made = gradients.BackwardConfig(rows, 4 * rows // 64, 2, unit, None, workers)
    monkeypatch.setattr(gradients, "config", lambda *_: made)


def make(b, h, hkv, sq, sk, d, dv=None, dtype=torch.float32, transposed=True):
    """q, k, v, and a gradient of the output [B, Sq, H, Dv]."""
    out = []
    dv = dv or d
    shapes = [(b, h, sq, d), (b, hkv, sk, d), (b, hkv, sk, dv), (b, h, sq, dv)]
    for i, shape in enumerate(shapes):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(DEVICE, dtype)
        out.append(x.transpose(1, 2).contiguous().transpose(1, 2) if transposed else x)
    q, k, v, grad = out
    return q, k, v, grad.transpose(1, 2)


def compare(q, k, v, grad, mask, allowed, *, sinks=None, scale=0.2, softcap=0.0):
    """The backend's gradients against the oracle's; returns them."""
    mask = None if mask is None else mask.to(DEVICE)
    allowed = None if allowed is None else allowed.to(DEVICE)
    sinks = None if sinks is None else sinks.to(DEVICE)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = reference_attention(*exact, allowed, sinks=sinks, scale=scale, softcap=softcap)
    wants = torch.autograd.grad(out, exact, grad.transpose(1, 2).double())
    out = out.detach().to(q.dtype).transpose(1, 2).contiguous()
    lse = lse.detach().float()
    *grads, delta = backend.backward(grad, q, k, v, out, lse, mask, scale, softcap)
    for name, x, got, want in zip("qkv", (q, k, v), grads, wants, strict=True):
        assert got.dtype == x.dtype and got.shape == x.shape
        assert got.stride() == plain.gradient_like(x).stride()
        limit = TOLERANCE[x.dtype] * (1 + want.abs().max().item())
        assert (got.double() - want).abs().max().item() <= limit, f"d{name}"
    want = (out.double() * grad.double()).sum(-1).transpose(1, 2)
    torch.testing.assert_close(delta.double(), want, atol=1e-4, rtol=1e-4)
    return grads


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim, value_dim", [(64, 64), (16, 16), (20, 33), (128, 64), (256, 256)])
def test_head_sizes(dtype, dim, value_dim):
    x = make(1, 2, 2, 70, 130, dim, value_dim, dtype)
    if not gradients.supported(x[0], x[2], None):
        assert dtype == torch.float32 and dim > 64
        pytest.skip("plain PyTorch computes this")
    mask = SparseMask.from_pattern(patterns.Longformer(20, (0,)), 70, 130, q_offset=60)
    compare(*x, mask, mask.to_dense(), scale=dim**-0.5)


@pytest.mark.parametrize(
    "sq, sk", [(1, 1), (1, 200), (3, 65), (64, 64), (63, 129), (5, 192), (200, 70), (257, 257)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_lengths(tiles, sq, sk, masked):
    mask = SparseMask.from_pattern(patterns.Causal(), sq, sk, q_offset=max(0, sk - sq))
    compare(*make(1, 2, 1, sq, sk, 32), *((mask, mask.to_dense()) if masked else (None, None)))


@pytest.mark.parametrize(
    "pattern",
    [
        patterns.Causal(),
        patterns.SlidingWindow(10, 3),
        ~patterns.SlidingWindow(70, 70),
        patterns.Longformer(20, (0, 100)),
        patterns.BigBird(16, (0, 150), 1),
        patterns.Dilated(10, 3),
        patterns.Chunked(90),
        patterns.PrefixLM(100),
        patterns.Documents([i // 50 for i in range(200)]) & patterns.Causal(),
        patterns.GlobalTokens((5,)),
        patterns.GlobalKeys((5, 150)),
        patterns.BlockTable(np.random.default_rng(0).random((2, 4, 4)) < 0.4, 64),
    ],
    ids=lambda p: type(p).__name__,
)
def test_patterns(tiles, pattern):
    mask = SparseMask.from_pattern(pattern, 200)
    compare(*make(1, 2, 2, 200, 200, 16), mask, mask.to_dense())


@pytest.mark.parametrize("mask_shape", [(2, 4), (1, 4), (2, 1)], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("padding", PADDINGS)
def test_batch_heads_and_padding(mask_shape, kv_heads, padding):
    compare(*make(2, 4, kv_heads, 70, 140, 16), *padded(mask_shape, padding))


@pytest.mark.parametrize("options", [
    {"softcap": 2.0},
    {"sinks": torch.tensor([0.3, -1.0, 2.0, 0.0])},
    {"softcap": 5.0, "sinks": torch.ones(4)},
    {"scale": -0.4},
    {"scale": 0.0},
], ids=lambda o: "-".join(o))  # fmt: skip
@pytest.mark.parametrize("empty_rows", [False, True])
def test_options(options, empty_rows):
    g = torch.Generator().manual_seed(6)
    allowed = torch.rand(1, 1, 70, 140, generator=g) < (0.01 if empty_rows else 0.4)
    assert bool((~allowed.any(-1)).any()) == empty_rows
    compare(*make(2, 4, 2, 70, 140, 16), SparseMask.from_dense(allowed), allowed, **options)


@pytest.mark.parametrize("layout", ["transposed", "plain", "sliced", "strided", "expanded"])
def test_strides(layout):
    q, k, v, grad = make(1, 2, 2, 70, 70, 24, transposed=layout == "transposed")
    if layout == "sliced":
        room = torch.full((1, 2, 71, 25), torch.nan, device=DEVICE)
        q, k, v = (room.clone()[:, :, 1:, 1:].copy_(x) for x in (q, k, v))
        grad = torch.full((1, 75, 3, 25), torch.nan, device=DEVICE)[:, 5:, 1:, 1:].copy_(grad)
    elif layout == "strided":
        room = torch.full((1, 2, 70, 48), torch.nan, device=DEVICE)
        q, k, v = (room.clone()[..., ::2].copy_(x) for x in (q, k, v))
    elif layout == "expanded":
        grad = torch.ones((), device=DEVICE).expand(grad.shape)
    mask = SparseMask.from_pattern(patterns.Causal(), 70)
    compare(q, k, v, grad, mask, mask.to_dense())


@pytest.mark.parametrize("heads, kv_heads", [(3, 1), (6, 2), (71, 1)])
@pytest.mark.parametrize("q_len", [1, 30])
def test_odd_groups(heads, kv_heads, q_len):
    mask = SparseMask.from_pattern(patterns.Causal(), q_len, 80, q_offset=80 - q_len)
    compare(*make(1, heads, kv_heads, q_len, 80, 16), mask, mask.to_dense())


@pytest.fixture
def short_pieces(monkeypatch):
    """Blocks of a few tiles are split already."""
    monkeypatch.setattr(plan, "_MERGE_COST", 0.5)
    monkeypatch.setattr(plan, "_LEAST_PIECE", 3.0)


@pytest.mark.parametrize("rows, unit", TILES)
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize(
    "pattern, split",
    [
        (patterns.GlobalKeys(tuple(range(9))), (False, True)),
        (patterns.GlobalTokens((0, 1)), (True, True)),
        (patterns.Full() & ~patterns.GlobalKeys((70,)), (True, True)),
    ],
    ids=["keys", "tokens", "all but one"],
)
def test_heavy_blocks_are_split(monkeypatch, short_pieces, pattern, split, kv_heads, rows, unit):
    use_tiles(monkeypatch, rows, unit, workers=64)
    mask = SparseMask.from_pattern(pattern, 600).to(DEVICE)
    compare(*make(1, 2, kv_heads, 600, 600, 16), mask, mask.to_dense())
    call = mask.plans["triton backward calls"].popitem()[1]
    assert (call.by_queries.slots > 0, call.by_keys.slots > 0) == split


@pytest.mark.parametrize("known", [True, False])
def test_equal_calls_give_equal_bits(monkeypatch, short_pieces, known):
    use_tiles(monkeypatch, 64, 0, workers=64)
    mask = SparseMask.from_pattern(patterns.Longformer(20, (0, 300)), 500).to(DEVICE)
    mask = mask if known else replace(mask, plans={})
    x = make(1, 2, 1, 500, 500, 16, dtype=torch.float16)
    once, again = (compare(*x, mask, mask.to_dense()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_padding_changes_between_calls():
    q, k, v, grad = make(2, 2, 2, 70, 140, 16)
    mask = SparseMask.from_pattern(patterns.Full(), 70, 140).to(DEVICE)
    for real in ([140, 140], [3, 139], [0, 64]):
        valid = torch.arange(140) < torch.tensor(real)[:, None]
        compare(q, k, v, grad, mask.with_padding(valid), valid[:, None, None])
    assert len(mask.plans["triton backward calls"]) == 1


def test_hidden_tiles_may_hold_anything():
    """Of keys in tiles that nobody sees nothing is read; see docs/design.md on those within."""
    q, k, v, grad = make(1, 2, 2, 64, 192, 16)
    allowed = torch.zeros(64, 192, dtype=torch.bool)
    allowed[:, :64] = torch.rand(64, 64) < 0.5
    want = compare(q, k[:, :, :64], v[:, :, :64], grad, SparseMask.from_dense(allowed[:, :64]),
                   allowed[:, :64])  # fmt: skip
    k[:, :, 64:], v[:, :, 64:] = torch.nan, torch.inf
    mask = SparseMask.from_dense(allowed).to(DEVICE)
    out, lse = reference_attention(q, k[:, :, :64], v[:, :, :64], allowed[:, :64].to(DEVICE),
                                   scale=0.2)  # fmt: skip
    out = out.float().transpose(1, 2).contiguous()
    dq, dk, dv, _ = backend.backward(grad, q, k, v, out, lse.float(), mask, 0.2, 0.0)
    for got, expected in zip((dq, dk[:, :, :64], dv[:, :, :64]), want, strict=True):
        torch.testing.assert_close(got, expected)
    assert not dk[:, :, 64:].any() and not dv[:, :, 64:].any()


@settings(max_examples=8)
@given(cases(), st.sampled_from([16, 40]), st.sampled_from(list(TOLERANCE)), st.booleans())
def test_random_masks(case, dim, dtype, grouped):
    allowed = case.truth()
    batch, heads = (n if n > 1 else 2 for n in allowed.shape[:2])
    kv_heads = 1 if grouped else heads
    x = make(batch, heads, kv_heads, case.q_len, case.kv_len, dim, dtype=dtype)
    compare(*x, case.mask(), allowed)
    # Without what the host knows of it, the mask is planned on the device.
    compare(*x, replace(case.mask(), plans={}), allowed)
    bits_alone = structure_of(case.truth(padding=False))
    mask = SparseMask(case.q_len, case.kv_len, *bits_alone).with_padding(case.padding)
    compare(*x, mask, allowed)


@settings(max_examples=40)
@given(cases())
def test_transposed_runs_and_bits_are_the_transposed_mask(case):
    mask = case.mask(padding=False)
    back = SparseMask.from_dense(mask.to_dense().transpose(2, 3))
    runs = transposed(mask.host_runs(), bits.words_per(case.kv_len))
    words = bits.transpose(mask.tile_bits)
    ptr, row, length, content = (torch.from_numpy(x.astype(np.int32)) for x in runs)
    made = SparseMask(case.kv_len, case.q_len, mask.pattern_id, ptr, row, length, content, words)
    assert torch.equal(made.to_dense()[..., : case.kv_len, : case.q_len], back.to_dense())


def test_a_plan_serves_calls_of_the_same_kind():
    mask = SparseMask.from_pattern(patterns.Causal(), 300)
    made = backward_plan(mask, 64, 8, 2, 16, 1)
    assert backward_plan(mask, 64, 8, 2, 16, 1) is made
    assert backward_plan(mask, 128, 8, 2, 16, 1).words is made.words


def test_who_computes(monkeypatch):
    q, _, v, _ = make(1, 2, 2, 70, 70, 16)
    mask = SparseMask.from_pattern(patterns.Causal(), 200)
    assert gradients.supported(q, v, None) and gradients.supported(q, v, mask)
    assert not gradients.supported(q, v, mask.rows(3, 70, 70))
    assert not gradients.supported(*(x.new_empty(1, 2, 70, 128) for x in (q, v)), None)
    half = torch.empty(1, 1, 70, 256, dtype=torch.float16)
    assert gradients.supported(half, half, None)
    monkeypatch.setattr(gradients, "shared_memory", lambda device: 99 << 10)
    assert not gradients.supported(half, half, None)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_backward_finds_what_is_known_of_a_mask(monkeypatch, compiled):
    found, original = [], gradients.backward

    def watched(*args):
        found.append(args[6].plans)
        return original(*args)

    monkeypatch.setattr(gradients, "backward", watched)
    mask = SparseMask.from_pattern(patterns.Causal(), 70)
    q, k, v = (x.cpu().requires_grad_() for x in make(1, 2, 2, 70, 70, 16)[:3])

    def call(q, k, v):
        return stof_hf.attention(q, k, v, mask)

    if compiled:
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    call(q, k, v).sum().backward()
    assert len(found) == 1 and found[0] is mask.plans


def test_gradients_of_bias_and_sinks_come_from_elsewhere():
    """Through the op on the CPU, where plain PyTorch computes everything."""
    q, k, v, _ = make(1, 2, 2, 70, 70, 16)
    q, k, v = (x.cpu().requires_grad_() for x in (q, k, v))
    bias, sinks = (torch.randn(n, requires_grad=True) for n in (70, 2))
    stof_hf.attention(q, k, v, bias=bias, sinks=sinks).square().sum().backward()
    assert q.grad.stride() == q.stride()
    assert bias.grad.shape == bias.shape and sinks.grad.shape == sinks.shape


@pytest.mark.timeout(900)
def test_every_kernel_compiles_and_fits():
    """For GPUs that need not be here: into shared memory, and on Hopper into registers."""
    found = without_a_gpu("compile_backward.py")
    assert len(found) >= 45
    assert not wrong(found), wrong(found)
    assert any("sum_kernel" in case[0] for case in found)
    for name, _, _, _, spilled, products, warnings in found:
        if "sm_90 gradients_kernel" in name and "float16" in name and "softcap=0.0" in name:
            assert products > 0 and not warnings, name
            # Of two blocks a multiprocessor with heads of 128, dropout takes the last registers.
            budget = 320 if "x128 " in name and "dropout=6554" in name else 128
            assert spilled <= budget or "x256 " in name, name
