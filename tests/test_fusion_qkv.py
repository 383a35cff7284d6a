"""The packed QKV projection against fp64: compiled on a GPU, interpreted where there is none."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from stof_hf.errors import UnsupportedError

pytest.importorskip("triton", reason="Triton is not installed")
from gemms import (  # noqa: E402
    DEVICE,
    PARAMS,
    TOLERANCE,
    assert_compiles,
    assert_defaults_fit,
    assert_near,
    dtypes,
    matrix,
)

from stof_hf.fusion.templates import qkv as template  # noqa: E402
from stof_hf.fusion.templates.qkv import fits, qkv  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def oracle(x, w, bias, heads, kv_heads, cos=None, sin=None):
    """cos and sin [M, D]."""
    y = x.double() @ w.double().T
    if bias is not None:
        y += bias.double()
    if cos is None:
        return y
    split = (heads, kv_heads, kv_heads)
    q, k, v = y.unflatten(-1, (sum(split), -1)).split(split, 1)
    q, k = apply_rotary_pos_emb(q, k, cos.double(), sin.double())
    return torch.cat((q, k, v), 1).flatten(1)


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 70)), st.integers(1, 150), dtypes,
    st.tuples(st.integers(1, 3), st.integers(1, 3)), st.sampled_from([2, 16, 22, 64, 80, 128]),
    st.sampled_from(["none", "shared", "of each row", "int32", "int64"]), st.data(),
    st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
)  # fmt: skip
def test_random_shapes_and_positions(rows, k, dtype, groups, dim, positions, data, flags):
    (batch, length), (kv_heads, group) = rows, groups
    with_bias, transposed, amid_nan, tables_fp32 = flags
    m, heads = batch * length, kv_heads * group
    fitting = [p for p in PARAMS if fits(p, dtype, shared_memory=227 << 10)]
    params = data.draw(st.sampled_from([None, *fitting]))
    n = (heads + 2 * kv_heads) * dim
    x = matrix(m, k, dtype, amid_nan=amid_nan)
    w = matrix(n, k, dtype, amid_nan=amid_nan, transposed=transposed, scale=k**-0.5)
    bias = matrix(1, n, dtype)[0] if with_bias else None
    options = {"heads": heads, "kv_heads": kv_heads}
    place = torch.arange(m, device=DEVICE)
    if positions != "none":
        stored = {"shared": length, "of each row": m}.get(positions, 40)
        table = torch.float32 if tables_fp32 else dtype
        # Both halves differ, though Transformers repeats the first.
        for name in ("cos", "sin"):
            options[name] = matrix(stored, dim, table, amid_nan=amid_nan, scale=0.7)
        place = place % stored
        if stored == 40:
            place = torch.randint(40, (m,), device=DEVICE)
            options["positions"] = place.to(getattr(torch, positions))
    got = qkv(x, w, bias, **options, params=params)
    assert got.shape == (m, n) and got.dtype == dtype
    tables = (options["cos"][place], options["sin"][place]) if positions != "none" else ()
    assert_near(got, oracle(x, w, bias, heads, kv_heads, *tables))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_projections_of_llama_and_their_views(dtype):
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding

    batch, length, heads, kv_heads, dim = 2, 35, 4, 2, 32
    config = LlamaConfig(hidden_size=heads * dim, num_attention_heads=heads, head_dim=dim)
    x = matrix(batch * length, heads * dim, dtype)
    w = matrix((heads + 2 * kv_heads) * dim, heads * dim, dtype, scale=0.1)
    ids = torch.arange(length, device=DEVICE)[None] + torch.tensor([[0], [7]], device=DEVICE)
    cos, sin = LlamaRotaryEmbedding(config).to(DEVICE)(x, ids)
    out = qkv(x, w, heads=heads, kv_heads=kv_heads, cos=cos.flatten(0, 1), sin=sin.flatten(0, 1))
    q, k, v = out.view(batch, length, -1, dim).split((heads, kv_heads, kv_heads), 2)
    rows = [y.view(batch, length, -1, dim).mT for y in (x.double() @ w.double().T).split(
        (heads * dim, kv_heads * dim, kv_heads * dim), -1)]  # fmt: skip
    want_q, want_k, want_v = (y.mT.transpose(1, 2) for y in rows)
    want_q, want_k = apply_rotary_pos_emb(want_q, want_k, cos.double(), sin.double())
    for got, want in ((q, want_q), (k, want_k), (v, want_v)):
        assert got.data_ptr() >= out.data_ptr() and got.stride(-1) == 1
        torch.testing.assert_close(
            got.transpose(1, 2).double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
        )


@pytest.mark.parametrize("position", [-1, 40, 2**33])
def test_a_position_beyond_the_tables_makes_nan_of_queries_and_keys_alone(position):
    x, w, table = matrix(5, 32), matrix(4 * 16, 32), matrix(40, 16)
    positions = torch.tensor([3, position, 0, 39, 4], device=DEVICE)
    out = qkv(x, w, heads=2, kv_heads=1, cos=table, sin=table, positions=positions)
    assert out[1, :48].isnan().all() and not out[1, 48:].isnan().any()
    assert not out[[0, 2, 3, 4]].isnan().any()


def test_values_are_not_touched_by_the_rotation():
    """Not even by 0 * infinity: the second half of the value's head is infinite here."""
    x, w = torch.ones(3, 16, device=DEVICE).half(), torch.ones(32, 16, device=DEVICE).half()
    w[28:, 0] = torch.inf
    table = torch.ones(3, 8, device=DEVICE).half()
    out = qkv(x, w, heads=2, kv_heads=1, cos=table, sin=table)
    assert (out[:, 24:28] == 16).all() and out[:, 28:].isposinf().all()


def test_no_rows():
    table = matrix(4, 16)
    empty = qkv(matrix(0, 32), matrix(64, 32), heads=2, kv_heads=1, cos=table, sin=table)
    assert empty.shape == (0, 64)


GOOD = {"x": (8, 32), "w": (64, 32), "bias": (64,), "cos": (4, 16), "sin": (4, 16)}


@pytest.mark.parametrize("change, message", [
    ({"x": torch.zeros(2, 4, 32)}, "flatten"),
    ({"w": torch.zeros(64, 31)}, r"w \[64, 31\]"),
    ({"w": torch.zeros(65, 32), "bias": None}, "no multiple of 4 heads"),
    ({"bias": torch.zeros(63)}, r"bias \[63\]"),
    ({"cos": None}, "one of cos and sin"),
    ({"cos": torch.zeros(4, 8), "sin": torch.zeros(4, 8)}, "a part of each head"),
    ({"cos": torch.zeros(1, 4, 16), "sin": torch.zeros(1, 4, 16)}, r"must both be \[positions, 16"),
    ({"sin": torch.zeros(5, 16)}, "must both be"),
    ({"sin": torch.zeros(16, 4).t()}, r"sin\.contiguous\(\)"),
    ({"cos": torch.zeros(4, 16).int()}, "float tensor"),
    ({"cos": torch.zeros(3, 16), "sin": torch.zeros(3, 16)}, "no multiple of the 3 rows"),
    ({"positions": torch.zeros(7).long()}, r"int32 or int64 \[8\]"),
    ({"positions": torch.zeros(8)}, "int32 or int64"),
    ({"cos": None, "sin": None, "positions": torch.zeros(8).long()}, "without cos and sin"),
    ({"w": torch.zeros(64, 32, requires_grad=True)}, "no_grad"),
], ids=lambda v: v if isinstance(v, str) else "-".join(v))  # fmt: skip
def test_refuses(change, message):
    tensors = {name: torch.zeros(shape) for name, shape in GOOD.items()} | change
    tensors = {name: None if t is None else t.to(DEVICE) for name, t in tensors.items()}
    with pytest.raises(UnsupportedError, match=message):
        qkv(**tensors, heads=2, kv_heads=1)


def test_defaults_fit():
    assert_defaults_fit(template)


@pytest.mark.timeout(600)
def test_compiles_and_fits_into_shared_memory():
    assert_compiles("qkv", 22)
