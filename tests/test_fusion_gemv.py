"""Linear layers of one row against fp64: compiled on a GPU, interpreted where there is none."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import rotate_half

from stof_hf.errors import UnsupportedError

pytest.importorskip("triton", reason="Triton is not installed")
from compiling import without_a_gpu, wrong  # noqa: E402
from gemms import assert_near, dtypes, matrix  # noqa: E402

from stof_hf.fusion.parts import Norm  # noqa: E402
from stof_hf.fusion.templates.common import ACTIVATIONS  # noqa: E402
from stof_hf.fusion.templates.gemv import SPACE, default, fits, gemv  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_empty")

PARAMS = [
    params
    for values in itertools.product(*SPACE.values())
    if fits(params := dict(zip(SPACE, values, strict=True)))
]
sizes = st.one_of(st.integers(1, 150), st.sampled_from([1, 2, 8, 63, 64, 129, 600]))
norms = st.sampled_from(["none", "rms", "layer", "layer without bias"])


def norm_of(kind, k, dtype):
    if kind == "none":
        return None
    bias = matrix(1, k, dtype)[0] if kind == "layer" else None
    return Norm(matrix(1, k, dtype)[0], bias, 1e-5, kind == "rms")


def normalised(x, norm):
    """fp64; never rounded between."""
    x = x.double()
    if norm is None:
        return x
    weight = norm.weight.double()
    if norm.rms:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + norm.eps) * weight
    bias = None if norm.bias is None else norm.bias.double()
    return torch.nn.functional.layer_norm(x, x.shape[1:], weight, bias, norm.eps)


def activated(x, activation):
    return x if activation == "none" else ACT2FN[activation](x)


@given(
    sizes, sizes, dtypes, norms, st.sampled_from(ACTIVATIONS), st.sampled_from([None, *PARAMS]),
    st.tuples(*[st.booleans()] * 4),
)  # fmt: skip
def test_random_shapes(n, k, dtype, kind, activation, params, flags):
    transposed, amid_nan, with_bias, with_residual = flags
    x, norm = matrix(1, k, dtype, amid_nan=amid_nan), norm_of(kind, k, dtype)
    w = matrix(n, k, dtype, amid_nan=amid_nan, transposed=transposed, scale=k**-0.5)
    bias = matrix(1, n, dtype)[0] if with_bias else None
    residual = matrix(1, n, dtype, amid_nan=amid_nan) if with_residual else None
    got = gemv(x, w, bias, residual, activation=activation, norm=norm, params=params)
    want = normalised(x, norm) @ w.double().T
    want = activated(want if bias is None else want + bias.double(), activation)
    assert got.shape == (1, n) and got.dtype == dtype
    assert_near(got, want if residual is None else want + residual.double())


@given(
    sizes, sizes, dtypes, norms, st.sampled_from(ACTIVATIONS), st.sampled_from([None, *PARAMS]),
    st.booleans(),
)  # fmt: skip
def test_gated(n, k, dtype, kind, activation, params, transposed):
    x, norm = matrix(1, k, dtype), norm_of(kind, k, dtype)
    w = matrix(2 * n, k, dtype, amid_nan=True, transposed=transposed, scale=k**-0.5)
    got = gemv(x, w, activation=activation, gated=True, norm=norm, params=params)
    gate, up = (normalised(x, norm) @ w.double().T).chunk(2, 1)
    assert_near(got, activated(gate, activation) * up)


@given(
    st.integers(1, 150), st.sampled_from([2, 16, 22, 64, 80]), dtypes, norms,
    st.tuples(st.integers(1, 5), st.integers(0, 4)), st.sampled_from([None, *PARAMS]),
    st.tuples(st.booleans(), st.booleans()),
)  # fmt: skip
def test_rotated(k, dim, dtype, kind, heads, params, flags):
    (rotated, others), (with_bias, tables_fp32) = heads, flags
    n = (rotated + others) * dim
    x, norm = matrix(1, k, dtype), norm_of(kind, k, dtype)
    w = matrix(n, k, dtype, amid_nan=True, scale=k**-0.5)
    bias = matrix(1, n, dtype)[0] if with_bias else None
    table = torch.float32 if tables_fp32 else dtype
    cos, sin = (matrix(1, dim, table, amid_nan=True, scale=0.7) for _ in range(2))
    got = gemv(
        x, w, bias, heads=rotated + others, rotated_heads=rotated, cos=cos, sin=sin, norm=norm,
        params=params,
    )  # fmt: skip
    want = normalised(x, norm) @ w.double().T
    want = (want if bias is None else want + bias.double()).view(-1, dim)
    turned = want * cos.double() + rotate_half(want) * sin.double()
    turned[rotated:] = want[rotated:]
    assert_near(got, turned.view(1, -1))


def test_a_mean_far_from_zero_does_not_cancel():
    x = matrix(1, 512) + 1000
    norm, w = norm_of("layer", 512, torch.float32), matrix(32, 512, scale=512**-0.5)
    want = normalised(x, norm) @ w.double().T
    torch.testing.assert_close(gemv(x, w, norm=norm).double(), want, atol=1e-3, rtol=1e-3)


def rejected(message, *tensors, **options):
    with pytest.raises(UnsupportedError, match=message):
        gemv(*tensors, **options)


def test_refuses_what_it_does_not_compute():
    x, w, bias = matrix(1, 32), matrix(48, 32), matrix(1, 48)[0]
    table = matrix(1, 16)
    turns = {"cos": table, "sin": table, "heads": 3, "rotated_heads": 2}
    rejected("one row", matrix(2, 32), w)
    rejected("gated product has no bias", x, w, bias[:24], gated=True)
    rejected("neither it nor a rotated one has a residual", x, w, None, matrix(1, 48), **turns)
    rejected("rotated, not activated", x, w, activation="silu", **turns)
    rejected("4 of 3 heads", x, w, **turns | {"rotated_heads": 4})
    rejected("2 of 5 heads", x, w, **turns | {"heads": 5})
    rejected("one of cos and sin is None", x, w, **turns | {"sin": None})
    rejected("RMSNorm with a bias", x, w, norm=Norm(x[0], x[0], 1e-5, True))
    rejected("no_grad", x, w.clone().requires_grad_())
    assert gemv(x, w[:0]).shape == (1, 0)


@pytest.mark.parametrize("count", [1, 100, 4096, 20000])
@pytest.mark.parametrize("transposed", [False, True])
def test_defaults_fit(count, transposed):
    params = default(count, transposed=transposed)
    assert params.keys() == SPACE.keys() and fits(params)
    assert all(value in SPACE[name] for name, value in params.items())


def test_threads_have_a_vector_and_registers_left():
    assert fits({"block_n": 2, "block_k": 1024, "warps": 4})
    assert not fits({"block_n": 1, "block_k": 512, "warps": 4})
    assert not fits({"block_n": 8, "block_k": 1024, "warps": 4})


@pytest.mark.timeout(600)
def test_compiles():
    cases = without_a_gpu("compile_norms.py", "gemv")
    assert len(cases) > 100
    assert not wrong(cases), wrong(cases)
