"""The CUDA decode kernel against the fp64 oracle, on a GPU."""

import random
from itertools import product

import pytest
import torch

from stof_hf import SparseMask, attention, patterns
from stof_hf.attention.reference import reference_attention
from stof_hf.masks.cache import mask_for

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_empty")]

TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
CUDA = torch.device("cuda")
DIMS = (32, 64, 80, 96, 128, 256)


@pytest.fixture(autouse=True)
def on_ampere():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the GPU is older than Ampere")


def make(batch, heads, kv_heads, q_len, kv_len, dim, dtype, seed=0, cache=True):
    g = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, device="cuda", dtype=dtype)

    q = draw(batch, q_len, heads, dim).transpose(1, 2)
    if cache:
        # Of a cache that is longer than what is used of it.
        k, v = (draw(batch, kv_heads, kv_len + 40, dim)[:, :, :kv_len] for _ in range(2))
    else:
        k, v = (draw(batch, kv_len, kv_heads, dim).transpose(1, 2) for _ in range(2))
    return q, k, v


def decode(q, k, v, mask, splits=None, *, sinks=None, scale=0.2, softcap=0.0, bias=None):
    from stof_hf.attention import cuda_decode

    # What the kernel allocates comes from this memory: what it does not write shows.
    torch.full((1 << 22,), torch.nan, device="cuda")
    if bias is not None:
        bias = bias[(None,) * (4 - bias.ndim)]
    call = cuda_decode.DecodeCall(q, k, v, mask, bias, sinks, scale, softcap, splits)
    return call(q, k, v, mask, bias, sinks)


def compare(q, k, v, mask, dense, splits=None, **options):
    out, lse = decode(q, k, v, mask, splits, **options)
    options = {"scale": 0.2, "softcap": 0.0, "bias": None, "sinks": None} | options
    want, want_lse = reference_attention(q, k, v, dense, **options)
    near = {"atol": TOLERANCE[q.dtype], "rtol": TOLERANCE[q.dtype]}
    torch.testing.assert_close(out.transpose(1, 2).double(), want, **near)
    torch.testing.assert_close(lse.double(), want_lse, atol=2e-3, rtol=1e-3)


def random_pattern(rng, batch, heads, size):
    blocks = torch.rand(rng.choice([1, batch]), rng.choice([1, heads]), 12, 12) < 0.4

    def by_head(b, h, q, k):
        return blocks.to(q.device)[
            b % len(blocks), h % blocks.shape[1], q * 12 // size, k * 12 // size
        ]

    return rng.choice(
        [
            patterns.Full(),
            patterns.Causal(),
            patterns.SlidingWindow(rng.randrange(1, size), 0),
            patterns.Longformer(rng.randrange(1, 200), (0, size // 2)),
            patterns.BigBird(65, block_size=16, random_blocks=1, seed=rng.randrange(99)),
            patterns.Custom(by_head, *blocks.shape[:2]),
        ]
    )


@pytest.mark.parametrize("seed", range(120))
def test_random_views(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    batch, kv_heads = rng.choice([1, 2, 3]), rng.choice([1, 2])
    heads = kv_heads * rng.choice([1, 2, 4, 5, 8])
    q_len, size = rng.randrange(1, 17), rng.choice([17, 100, 640, 1500])
    size = max(size, q_len)
    dim, dtype = rng.choice(DIMS), rng.choice(list(TOLERANCE))
    stored = mask_for(random_pattern(rng, batch, heads, size), size, size, device=CUDA)
    if rng.random() < 0.2:
        stored = SparseMask.from_pattern(
            stored.pattern or patterns.Causal(), q_len, size, device="cuda"
        )
        row = col = 0
        kv_len, mask = size, stored
        dense = stored.to_dense()
    else:
        row, col = rng.randrange(size - q_len + 1), rng.choice([0, rng.randrange(size)])
        kv_len = rng.randrange(1, size - col + 1)
        starts = [torch.tensor([x], device="cuda") if rng.random() < 0.5 else x for x in (row, col)]
        mask = stored.rows(starts[0], q_len, kv_len, starts[1])
        dense = stored.to_dense()[..., row : row + q_len, col : col + kv_len]
    if rng.random() < 0.5:
        valid = torch.rand(batch, kv_len, device="cuda") < rng.choice([0.1, 0.9])
        mask = mask.with_padding(valid)
        dense = dense & valid[:, None, None]
    options = {}
    if rng.random() < 0.3:
        options["sinks"] = torch.randn(heads, device="cuda")
    if rng.random() < 0.3:
        options["softcap"] = 3.0
    if rng.random() < 0.4:
        shape = [rng.choice([1, n]) for n in (batch, heads, q_len, kv_len)]
        bias_dtype = rng.choice([torch.float32, dtype])
        options["bias"] = torch.randn(shape, device="cuda", dtype=bias_dtype)
    q, k, v = make(batch, heads, kv_heads, q_len, kv_len, dim, dtype, seed, rng.random() < 0.7)
    splits = rng.choice([None, 1, 2, 7, 40])
    compare(q, k, v, mask, dense, splits, **options)


@pytest.mark.parametrize(("dim", "dtype"), product(DIMS, TOLERANCE))
def test_every_head_size(dim, dtype):
    mask = mask_for(patterns.Full(), 1, 777, device=CUDA)
    compare(*make(2, 8, 2, 1, 777, dim, dtype), mask, None)


@pytest.mark.parametrize("heads", [6, 24, 71])
def test_many_heads_that_share_keys(heads):
    mask = SparseMask.from_pattern(patterns.Causal(), 5, 300, q_offset=295, device="cuda")
    compare(*make(2, heads, 1, 5, 300, 64, torch.float16), mask, mask.to_dense())


def test_a_list_of_more_tiles_than_a_block_holds():
    size = 40_000
    stored = mask_for(patterns.Longformer(15_000, (0, 7)), size, size, device=CUDA)
    mask = stored.rows(size - 3, 2, size)
    dense = torch.zeros(2, size, dtype=torch.bool, device="cuda")
    for i, row in enumerate((size - 3, size - 2)):
        dense[i, max(0, row - 15_000) :] = True
        dense[i, [0, 7]] = True
    compare(*make(1, 4, 2, 2, size, 64, torch.float16), mask, dense[None, None], 1)


def test_keys_that_nobody_sees_are_not_read():
    q, k, v = make(1, 8, 2, 1, 500, 128, torch.float16)
    valid = torch.ones(1, 500, dtype=torch.bool, device="cuda")
    valid[:, :100] = valid[:, 300:310] = False
    k[:, :, ~valid[0]] = torch.nan
    v[:, :, ~valid[0]] = torch.inf
    mask = mask_for(patterns.Full(), 1, 500, device=CUDA).with_padding(valid)
    out, _ = decode(q, k, v, mask)
    want, _ = decode(q, k[:, :, valid[0]], v[:, :, valid[0]], mask_for(
        patterns.Full(), 1, int(valid.sum()), device=CUDA))  # fmt: skip
    torch.testing.assert_close(out, want, atol=2e-3, rtol=2e-3)


def test_a_graph_reads_where_the_view_begins():
    stored = mask_for(patterns.SlidingWindow(100, 0), 1024, 1024, device=CUDA)
    q, k, v = make(1, 8, 2, 1, 1024, 64, torch.float16)
    row = torch.tensor([0], device="cuda")
    attention(q, k, v, stored.rows(row, 1, 1024), scale=0.2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k, v, stored.rows(row, 1, 1024), scale=0.2)
    for at in (3, 64, 500, 1023):
        row.fill_(at)
        graph.replay()
        dense = stored.to_dense()[..., at : at + 1, :]
        want, _ = reference_attention(q, k, v, dense, scale=0.2, softcap=0.0, bias=None, sinks=None)
        torch.testing.assert_close(out.double(), want, atol=4e-3, rtol=4e-3)


def test_rows_that_are_not_aligned_are_computed_elsewhere():
    base = torch.randn(2, 4, 500 * 64 + 8, device="cuda", dtype=torch.float16)
    k, shifted = (base[..., i : i + 500 * 64].view(2, 4, 500, 64) for i in (0, 1))
    q = torch.randn(2, 4, 1, 64, device="cuda", dtype=torch.float16)
    for x in (k, shifted, k):
        out = attention(q, x, x, None, scale=0.2)
        want, _ = reference_attention(q, x, x, None, scale=0.2, softcap=0.0, bias=None, sinks=None)
        torch.testing.assert_close(out.double(), want, atol=4e-3, rtol=4e-3)


def test_keys_that_batch_elements_share_without_a_copy():
    q, k, v = make(3, 8, 2, 1, 300, 64, torch.float16)
    k, v = (x[:1].expand(3, -1, -1, -1) for x in (k, v))
    want, _ = reference_attention(q, k, v, None, scale=0.2, softcap=0.0, bias=None, sinks=None)
    out = attention(q, k, v, None, scale=0.2)
    torch.testing.assert_close(out.double(), want, atol=4e-3, rtol=4e-3)


def test_decoding_uses_this_kernel():
    from stof_hf.attention.cuda_decode import DecodeCall

    q, k, v = make(1, 8, 2, 1, 200, 64, torch.float16)
    mask = SparseMask.from_pattern(patterns.Causal(), 1, 200, q_offset=199, device="cuda")
    attention(q, k, v, mask)
    prepared = mask.plans["calls without lse"].values()
    assert [type(x.call) for x in prepared] == [DecodeCall]


@pytest.mark.parametrize("sharpness", [1, 2, 3, 5])
@pytest.mark.parametrize("splits", [1, 8])
def test_errors_are_those_of_sdpa(splits, sharpness):
    """Also where few keys take most of the weight, and maxima that lag behind make a difference."""
    q, k, v = make(16, 16, 16, 1, 2048, 128, torch.bfloat16)
    mask = SparseMask.from_pattern(patterns.Full(), 1, 2048, device="cuda")
    scale = sharpness * 128**-0.5
    want, _ = reference_attention(q, k, v, None, scale=scale, softcap=0.0, bias=None, sinks=None)
    sdpa = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    ours = decode(q, k, v, mask, splits, scale=scale)[0].transpose(1, 2)
    mine, theirs = ((x.double() - want).square().mean().sqrt() for x in (ours, sdpa))
    assert mine <= 1.1 * theirs


@pytest.mark.parametrize("splits", [1, 8, 40])
def test_without_logarithms_the_result_is_the_same(splits):
    from stof_hf.attention.cuda_decode import DecodeCall

    q, k, v = make(2, 8, 2, 1, 3000, 64, torch.float16)
    mask = SparseMask.from_pattern(patterns.Full(), 1, 3000, device="cuda")
    rest = q, k, v, mask, None, None, 0.2, 0.0, splits
    outs = [DecodeCall(*rest, n)(q, k, v, mask, None, None) for n in (True, False)]
    assert torch.equal(outs[0][0], outs[1][0]) and outs[1][1] is None
