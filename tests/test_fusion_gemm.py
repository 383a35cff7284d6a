"""The GEMM template against fp64: compiled on a GPU, interpreted where there is none."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.activations import ACT2FN

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
    sizes,
)

from stof_hf.fusion.templates import gemm as template  # noqa: E402
from stof_hf.fusion.templates.common import ACTIVATIONS  # noqa: E402
from stof_hf.fusion.templates.gemm import fits, gemm  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def oracle(x, w, bias=None, residual=None, activation="none"):
    y = x.double() @ w.double().T
    if bias is not None:
        y += bias.double()
    if activation != "none":
        y = ACT2FN[activation](y)
    return y if residual is None else y + residual.double()


@given(
    st.tuples(sizes, sizes, sizes), dtypes, st.sampled_from(ACTIVATIONS), st.data(),
    st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
)  # fmt: skip
def test_random_shapes_and_options(shape, dtype, activation, data, flags):
    (m, n, k), (with_bias, with_residual, transposed, amid_nan) = shape, flags
    fitting = [p for p in PARAMS if fits(p, dtype, shared_memory=227 << 10)]
    params = data.draw(st.sampled_from([None, *fitting]))
    x = matrix(m, k, dtype, amid_nan=amid_nan)
    w = matrix(n, k, dtype, amid_nan=amid_nan, transposed=transposed, scale=k**-0.5)
    # Every second element of a longer vector, too.
    bias = matrix(1, 2 * n, dtype)[0, :: 2 if amid_nan else 1][:n] if with_bias else None
    residual = matrix(m, n, dtype, amid_nan=amid_nan) if with_residual else None
    got = gemm(x, w, bias, residual, activation=activation, params=params)
    assert got.shape == (m, n) and got.dtype == dtype
    assert_near(got, oracle(x, w, bias, residual, activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_those_of_transformers_far_from_zero_too(activation):
    x = torch.linspace(-30, 30, 16 * 601, device=DEVICE).view(601, 16)
    eye = torch.eye(16, device=DEVICE)
    got = gemm(x, eye, activation=activation)
    want = oracle(x, eye, activation=activation)
    # The forms of GELU differ by up to 5e-4.
    torch.testing.assert_close(got.double(), want, atol=3e-6, rtol=3e-6)


def test_nan_stays_nan_and_infinity_infinity():
    # Products of fp32 split their operands, which makes NaN of infinity.
    x = torch.tensor([[torch.nan], [torch.inf], [-torch.inf]], device=DEVICE).half()
    one = torch.ones(1, 1, device=DEVICE).half()
    assert gemm(x, one, activation="relu")[:, 0].tolist()[1:] == [torch.inf, 0]
    for activation in ACTIVATIONS:
        y = gemm(x, one, activation=activation)[:, 0]
        assert y[0].isnan() and y[1] == torch.inf


def test_conv1d_weight_of_gpt2_needs_no_copy():
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(96, 40).to(DEVICE).requires_grad_(False)
    x = matrix(70, 40)
    want = layer.double()(x.double())
    layer.float()
    assert_near(gemm(x, layer.weight.t(), layer.bias), want)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="takes 4 GiB where memory is not given lazily")
@pytest.mark.parametrize("far", ["x", "w", "residual"])
def test_offsets_beyond_31_bits(far):
    storage = torch.from_numpy(np.zeros(2**31 + 64, np.float16))
    tensors = {name: matrix(3, 32, torch.float16) for name in ("x", "w")}
    tensors["residual"] = matrix(3, 3, torch.float16)
    near = tensors[far]
    tensors[far] = storage.as_strided(near.shape, (2**30, 1)).copy_(near)
    assert_near(gemm(**tensors), oracle(**tensors))


def test_no_rows():
    assert gemm(matrix(0, 32), matrix(48, 32)).shape == (0, 48)


GOOD = {"x": (8, 32), "w": (48, 32), "bias": (48,), "residual": (8, 48)}


@pytest.mark.parametrize("change, message", [
    ({"x": torch.zeros(2, 8, 32)}, "flatten"),
    ({"x": torch.zeros(8, 0), "w": torch.zeros(48, 0)}, "features >= 1"),
    ({"x": torch.zeros(8, 31)}, r"w \[48, 32\].* expected \[48, 31\]"),
    ({"x": torch.zeros(32, 8).t()}, r"x\.contiguous\(\)"),
    ({"x": torch.zeros(8, 32).double()}, "float16"),
    ({"w": torch.zeros(48, 32).half()}, "one dtype"),
    ({"bias": torch.zeros(1, 48)}, r"bias \[1, 48\]"),
    ({"bias": torch.zeros(48, device="meta")}, "one device"),
    ({"residual": torch.zeros(1, 48)}, r"residual \[1, 48\]"),
    ({"residual": torch.zeros(48, 8).t()}, r"residual\.contiguous\(\)"),
    ({"activation": "gelu_10"}, "'gelu_10'"),
    ({"w": torch.zeros(48, 32, requires_grad=True)}, "no_grad"),
], ids=lambda v: v if isinstance(v, str) else "-".join(v))  # fmt: skip
def test_refuses(change, message):
    tensors = {name: torch.zeros(shape) for name, shape in GOOD.items()} | change
    tensors = {
        name: t.to(DEVICE) if isinstance(t, torch.Tensor) and t.device.type == "cpu" else t
        for name, t in tensors.items()
    }
    with pytest.raises(UnsupportedError, match=message):
        gemm(**tensors)


def test_parameters_that_require_grad_are_fine_without_grad():
    layer = torch.nn.Linear(32, 48, device=DEVICE)
    with torch.no_grad():
        gemm(matrix(8, 32), layer.weight, layer.bias)


def test_defaults_fit():
    assert_defaults_fit(template)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_too_large_a_tile_does_not_fit(dtype):
    large = {"block_m": 256, "block_n": 256, "block_k": 32, "group_m": 1, "warps": 8, "stages": 2}
    assert not fits(large, dtype, shared_memory=227 << 10)
    deep = {"block_m": 128, "block_n": 64, "block_k": 64, "group_m": 1, "warps": 8, "stages": 5}
    assert not fits(deep, dtype, shared_memory=99 << 10)
    assert fits(deep | {"block_k": 32, "stages": 2}, dtype, shared_memory=99 << 10)


@pytest.mark.timeout(600)
def test_compiles_and_fits_into_shared_memory():
    assert_compiles("gemm", 44)
