"""The front of a gated MLP against fp64: compiled on a GPU, interpreted where there is none."""

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
    assert_compiles,
    assert_defaults_fit,
    assert_near,
    dtypes,
    matrix,
    sizes,
)

from stof_hf.fusion.templates import gated as template  # noqa: E402
from stof_hf.fusion.templates.common import ACTIVATIONS  # noqa: E402
from stof_hf.fusion.templates.gated import fits, gated  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def oracle(x, gate, up, activation="silu"):
    first = x.double() @ gate.double().T
    if activation != "none":
        first = ACT2FN[activation](first)
    return first * (x.double() @ up.double().T)


@given(
    st.tuples(sizes, sizes, sizes), dtypes, st.sampled_from(ACTIVATIONS), st.data(),
    st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip
def test_random_shapes(shape, dtype, activation, data, gate_transposed, up_transposed, amid_nan):
    m, n, k = shape
    fitting = [p for p in PARAMS if fits(p, dtype, shared_memory=227 << 10)]
    params = data.draw(st.sampled_from([None, *fitting]))
    x = matrix(m, k, dtype, amid_nan=amid_nan)
    gate, up = (
        matrix(n, k, dtype, amid_nan=amid_nan, transposed=transposed, scale=k**-0.5)
        for transposed in (gate_transposed, up_transposed)
    )
    got = gated(x, gate, up, activation=activation, params=params)
    assert got.shape == (m, n) and got.dtype == dtype
    assert_near(got, oracle(x, gate, up, activation))


def test_front_of_the_mlp_of_llama():
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

    config = LlamaConfig(hidden_size=48, num_attention_heads=4, intermediate_size=112)
    mlp = LlamaMLP(config).to(DEVICE)
    mlp.requires_grad_(False)
    x = matrix(70, 48)
    got = mlp.down_proj(gated(x, mlp.gate_proj.weight, mlp.up_proj.weight))
    torch.testing.assert_close(got.double(), mlp.double()(x.double()), atol=2e-5, rtol=2e-5)


def test_halves_of_one_packed_weight_are_views():
    x, packed = matrix(70, 48), matrix(200, 48, scale=48**-0.5)
    gate, up = packed.chunk(2)
    assert_near(gated(x, gate, up, activation="gelu"), oracle(x, gate, up, "gelu"))


def test_no_rows():
    assert gated(matrix(0, 32), matrix(48, 32), matrix(48, 32)).shape == (0, 48)


@pytest.mark.parametrize("change, message", [
    ({"x": (8, 2, 32)}, "flatten"),
    ({"x": (8, 31)}, r"gate \[48, 32\].* expected \[48, 31\]"),
    ({"up": (47, 32)}, r"up \[47, 32\].* expected \[48, 32\]"),
])  # fmt: skip
def test_refuses(change, message):
    shapes = {"x": (8, 32), "gate": (48, 32), "up": (48, 32)} | change
    with pytest.raises(UnsupportedError, match=message):
        gated(**{name: torch.zeros(shape, device=DEVICE) for name, shape in shapes.items()})


def test_refuses_what_gemm_refuses():
    x, w = matrix(8, 32), matrix(48, 32)
    with pytest.raises(UnsupportedError, match="no_grad"):
        gated(x, w, w.clone().requires_grad_())
    with pytest.raises(UnsupportedError, match=r"x\.contiguous\(\)"):
        gated(matrix(8, 32, transposed=True), w, w)
    with pytest.raises(UnsupportedError, match="'swiglu'"):
        gated(x, w, w, activation="swiglu")


def test_defaults_fit():
    assert_defaults_fit(template)


def test_both_products_count_for_what_fits():
    params = {"block_m": 128, "block_n": 128, "block_k": 64, "group_m": 1, "warps": 8, "stages": 4}
    assert fits(params, torch.float16, shared_memory=227 << 10)
    for change in ({"warps": 4}, {"block_n": 256}, {"stages": 5}):
        assert not fits(params | change, torch.float16, shared_memory=227 << 10)


@pytest.mark.timeout(600)
def test_compiles_and_fits_into_shared_memory():
    assert_compiles("gated", 16)
