"""A bias by distance against the dense one that it stands for."""

import pytest
import torch

import stof_hf
from stof_hf import RelativeBias, SparseMask, UnsupportedError, patterns
from stof_hf.attention.reference import reference_attention

on_gpu = [pytest.param("cuda", marks=pytest.mark.gpu)]


def make(q_len, kv_len, *, batch=1, heads=4, dtype=torch.float32, device="cpu"):
    table = torch.randn(batch, heads, q_len + kv_len - 1, device=device).to(dtype)
    return RelativeBias(table, q_len)


def inputs(q_len, kv_len, dtype=torch.float32, device="cpu"):
    return [torch.randn(2, 4, n, 64, device=device).to(dtype) for n in (q_len, kv_len, kv_len)]


@pytest.mark.parametrize("q_len, kv_len", [(5, 5), (1, 9), (9, 1), (3, 7)])
def test_every_element_is_that_of_its_distance(q_len, kv_len):
    bias = make(q_len, kv_len, batch=2)
    dense = bias.dense()
    assert dense.shape == bias.shape == (2, 4, q_len, kv_len)
    strides, first = bias.stride(), bias.first
    for i in range(q_len):
        for j in range(kv_len):
            assert torch.equal(dense[:, :, i, j], bias.table[:, :, q_len - 1 + j - i])
    # What kernels read: the address of element [1, 2, i, j].
    i, j = q_len - 1, kv_len - 1
    place = first.storage_offset() + strides[0] + 2 * strides[1] + i * strides[2] + j * strides[3]
    elements = bias.copies.view(-1)
    assert elements[place] == dense[1, 2, i, j]
    # And those whose rows of keys begin at multiples of eight elements.
    for i in range(q_len):
        start = q_len - 1 - i
        place = sum(
            n * s
            for n, s in zip((1, 2, start % 8, start // 8 * 8), bias.copies.stride(), strict=True)
        )
        assert torch.equal(elements[place : place + kv_len], dense[1, 2, i])
    assert all(s % 16 == 0 for s in bias.copies.stride()[:3])


def test_a_function_of_the_distance():
    table = torch.randn(3, 40)
    bias = RelativeBias.of_distances(lambda d: table.T[(d + 20).clamp(0, 39)], 9, 14, table.device)
    want = RelativeBias(table[None, :, 12:34], 9)
    assert bias.shape == (1, 3, 9, 14) and torch.equal(bias.dense(), want.dense())


@pytest.mark.parametrize("grad", [False, True])
def test_the_op_takes_it(grad):
    q, k, v = inputs(70, 130)
    table = torch.randn(1, 4, 199, requires_grad=grad)
    bias = RelativeBias(table, 70)
    mask = SparseMask.from_pattern(patterns.Longformer(40, (0,)), 70, 130, q_offset=60)
    want, _ = reference_attention(q, k, v, mask.to_dense(), bias=bias.dense())
    with torch.set_grad_enabled(grad):
        out = stof_hf.attention(q, k, v, mask, bias=bias)
        torch.testing.assert_close(out.double(), want.double(), atol=1e-5, rtol=1e-5)
        if grad:
            (given,) = torch.autograd.grad(out.square().sum(), table)
            (exact,) = torch.autograd.grad(want.square().sum(), table)
            torch.testing.assert_close(given, exact.float(), atol=1e-4, rtol=1e-3)


def test_what_does_not_fit_is_refused():
    with pytest.raises(UnsupportedError, match=r"table \[4, 9\] for 5 queries"):
        RelativeBias(torch.zeros(4, 9), 5)
    with pytest.raises(UnsupportedError, match="broadcast"):
        stof_hf.attention(*inputs(5, 6), bias=make(5, 5))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("q_len, kv_len", [(512, 512), (700, 700), (333, 1000), (1, 900)])
def test_gpu_kernels_read_the_table(q_len, kv_len, dtype):
    q, k, v = inputs(q_len, kv_len, dtype, "cuda")
    for bias_dtype in (dtype, torch.float32):
        bias = make(q_len, kv_len, dtype=bias_dtype, device="cuda")
        for pattern in (patterns.Full(), patterns.Longformer(100, (0,)), patterns.Causal()):
            mask = SparseMask.from_pattern(
                pattern, q_len, kv_len, q_offset=kv_len - q_len, device="cuda"
            )
            want, _ = reference_attention(q, k, v, mask.to_dense(), bias=bias.dense())
            torch.cuda.reset_peak_memory_stats()
            out = stof_hf.attention(q, k, v, mask, bias=bias)
            torch.testing.assert_close(out.double(), want.double(), atol=4e-3, rtol=4e-3)
            dense = stof_hf.attention(q, k, v, mask, bias=bias.dense())
            torch.testing.assert_close(out, dense, atol=2e-3, rtol=2e-3)
