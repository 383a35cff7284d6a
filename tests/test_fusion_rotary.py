"""Rotary embedding in place against an fp64 oracle and Transformers' own."""

import pytest
import torch
from compiling import misfits
from hypothesis import given
from hypothesis import strategies as st
from test_fusion_norm import DEVICE, DTYPES, fitting, rand
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

from stof_hf.errors import UnsupportedError

template = pytest.importorskip("stof_hf.fusion.templates.rotary", reason="Triton is not installed")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def packed(batch, seq_len, heads, kv_heads, dim, dtype):
    """Queries, keys and values as views of one projection, and that projection."""
    qkv = rand(batch, seq_len, (heads + 2 * kv_heads) * dim, dtype=dtype)
    parts = qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], 2)
    return qkv, *(x.unflatten(2, (-1, dim)) for x in parts)


def angles(batch, seq_len, width, dtype, seed=1):
    """Cosines and sines whose halves differ, so that neither is taken for the other."""
    return (rand(batch, seq_len, width, dtype=dtype, seed=s) for s in (seed, seed + 1))


def compare(q, k, cos, sin, params=None):
    want = apply_rotary_pos_emb(*(t.double() for t in (q, k, cos, sin)), unsqueeze_dim=2)
    assert template.rotary(q, k, cos, sin, params=params) is None
    near = {"atol": TOLERANCE[q.dtype], "rtol": TOLERANCE[q.dtype]}
    for got, wanted in zip((q, k), want, strict=True):
        torch.testing.assert_close(got.double(), wanted, **near)


@given(
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9),
    st.integers(1, 40), st.sampled_from(DTYPES), st.booleans(), st.data(),
)  # fmt: skip
def test_random_shapes_and_parameters(batch, seq_len, heads, kv_heads, half, dtype, shared, data):
    width = 2 * data.draw(st.integers(1, half))
    qkv, q, k, v = packed(batch, seq_len, heads, kv_heads, 2 * half, dtype)
    rest = [x.clone() for x in (q[..., width:], k[..., width:], v)]
    params = data.draw(fitting(template, width))
    compare(q, k, *angles(1 if shared else batch, seq_len, width, dtype), params)
    for now, before in zip((q[..., width:], k[..., width:], v), rest, strict=True):
        assert torch.equal(now, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch, seq_len, heads, kv_heads, dim, width", [
    (1, 128, 12, 12, 64, 64), (2, 33, 32, 8, 128, 128), (9, 1, 8, 2, 128, 128),
    (2, 17, 5, 1, 80, 20), (1, 5, 3, 3, 256, 256), (1, 1, 1, 1, 2, 2),
])  # fmt: skip
def test_untuned(dtype, batch, seq_len, heads, kv_heads, dim, width):
    _, q, k, _ = packed(batch, seq_len, heads, kv_heads, dim, dtype)
    compare(q, k, *angles(batch, seq_len, width, dtype))


def test_heads_before_tokens_and_cosines_of_another_dtype():
    q, k = (rand(2, h, 21, 32, dtype=torch.float16).transpose(1, 2) for h in (4, 2))
    compare(q, k, *angles(1, 21, 32, torch.float32))


def test_nothing_else_is_read_or_written():
    """Around the views, the angles included, all is NaN and stays NaN."""
    rooms = [torch.full((2, 9, 5, 40), torch.nan, device=DEVICE) for _ in range(3)]
    q, k = (room[:, 1:8, 1:4, 3:35] for room in rooms[:2])
    cos, sin = rooms[2][0, None, :7, 0, :32], rooms[2][1, None, :7, 3, 2:34]
    for seed, x in enumerate((q, k, cos, sin)):
        x.copy_(rand(*x.shape, seed=seed))
    inside = [room.isnan() for room in rooms]
    compare(q, k, cos, sin)
    assert all(torch.equal(room.isnan(), was) for room, was in zip(rooms, inside, strict=True))


def test_nothing_to_rotate():
    q, k = rand(2, 0, 3, 8), rand(2, 0, 3, 8)
    template.rotary(q, k, *angles(2, 0, 8, torch.float32))
    q, k = rand(2, 4, 3, 8), rand(2, 4, 3, 8)
    template.rotary(q, k, *angles(2, 4, 0, torch.float32))
    assert torch.equal(q, rand(2, 4, 3, 8))


@pytest.mark.parametrize("tokens", [1, 128, 32768])
@pytest.mark.parametrize("heads", [1, 12, 64])
@pytest.mark.parametrize("width", [2, 20, 64, 128, 256])
def test_the_default_fits(tokens, heads, width):
    params = template.default(tokens, heads, width, DEVICE)
    assert template.fits(params, width, shared_memory=99 << 10)
    assert all(params[name] in values for name, values in template.SPACE.items())


@pytest.mark.parametrize("change, message", [
    ({"q": torch.zeros(1, 3, 8)}, "transpose"),
    ({"k": torch.zeros(1, 4, 2, 8)}, "transpose"),
    ({"k": torch.zeros(1, 3, 2, 8).half()}, "float16"),
    ({"q": torch.zeros(1, 3, 2, 16)[..., ::2]}, "contiguous"),
    ({"cos": torch.zeros(1, 3, 6)}, "cos and sin"),
    ({"cos": torch.zeros(1, 3, 3), "sin": torch.zeros(1, 3, 3)}, "even"),
    ({"cos": torch.zeros(1, 3, 10), "sin": torch.zeros(1, 3, 10)}, "at most 8"),
    ({"q": torch.zeros(1, 3, 2, 8, requires_grad=True)}, "no_grad"),
], ids=lambda v: v if isinstance(v, str) else "")  # fmt: skip
def test_errors_name_the_way_out(change, message):
    given = {"q": torch.zeros(1, 3, 4, 8), "k": torch.zeros(1, 3, 2, 8)}
    given |= {"cos": torch.zeros(1, 3, 8), "sin": torch.zeros(1, 3, 8)} | change
    with pytest.raises(UnsupportedError, match=message):
        template.rotary(**given)


@pytest.mark.timeout(600)
def test_compiles_and_fits_into_shared_memory():
    assert not misfits("rotary")
