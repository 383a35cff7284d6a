"""GEMM + bias + residual + norm against an fp64 oracle."""

from types import SimpleNamespace

import pytest
import torch
from compiling import misfits
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fusion_norm import DEVICE, DTYPES, fitting, oracle, rand

from stof_hf.errors import UnsupportedError

template = pytest.importorskip(
    "stof_hf.fusion.templates.gemm_norm", reason="Triton is not installed"
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")

#: fp32 is multiplied as three TF32 products on a GPU; an output is rounded once.
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def compare(x, w, weight, shift=None, bias=None, residual=None, *, eps=1e-5, rms=False,
            offset=0.0, params=None):  # fmt: skip
    rest = {"eps": eps, "rms": rms, "offset": offset, "params": params}
    y, total = template.gemm_norm(x, w, weight, shift, bias, residual, return_sum=True, **rest)
    want = x.double() @ w.double().T
    want = sum((t.double() for t in (bias, residual) if t is not None), want)
    near = {"atol": TOLERANCE[x.dtype], "rtol": TOLERANCE[x.dtype]}
    torch.testing.assert_close(total.double(), want, **near)
    torch.testing.assert_close(y.double(), oracle(want, weight, shift, eps, rms, offset), **near)
    for out in (y, total):
        assert out.dtype == x.dtype and out.shape == want.shape and out.is_contiguous()
    # Another kernel, which may add in another order.
    alone = template.gemm_norm(x, w, weight, shift, bias, residual, **rest)
    torch.testing.assert_close(alone, y, **near)


def operands(m, n, k, dtype):
    return rand(m, k, dtype=dtype), rand(n, k, dtype=dtype, seed=1) * k**-0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("bias, residual", [(False, False), (True, False), (False, True), (1, 1)])
def test_options(dtype, rms, bias, residual):
    m, n, k = 19, 70, 50
    compare(
        *operands(m, n, k, dtype), rand(n, dtype=dtype, seed=2),
        None if rms else rand(n, dtype=dtype, seed=3),
        rand(n, dtype=dtype, seed=4) if bias else None,
        rand(m, n, dtype=dtype, seed=5) if residual else None,
        rms=rms, offset=float(rms),
    )  # fmt: skip


@settings(max_examples=30)
@given(
    st.integers(1, 70), st.integers(1, 130), st.integers(1, 150), st.sampled_from(DTYPES),
    st.booleans(), st.data(),
)  # fmt: skip
def test_random_shapes_and_parameters(m, n, k, dtype, conv1d, data):
    x, w = operands(m, n, k, dtype)
    w = w.T.contiguous().T if conv1d else w
    compare(x, w, rand(n), rand(n, seed=2), rand(n, seed=3), rand(m, n, dtype=dtype, seed=4),
            params=data.draw(fitting(template, n, dtype)))  # fmt: skip


@pytest.mark.parametrize("n", [1, 768, 1024])
def test_the_shortest_and_the_longest_rows(n):
    compare(*operands(33, n, 40, torch.float16), rand(n), rand(n, seed=2))


def test_no_rows():
    y = template.gemm_norm(*operands(0, 8, 4, torch.float16), rand(8), eps=1e-5)
    assert y.shape == (0, 8)


def test_rows_that_lie_apart():
    """What lies between rows and beyond a row's end is NaN."""
    room = torch.full((9, 3, 70), torch.nan, dtype=torch.float16, device=DEVICE)
    x, residual = room[:, 0, 3:53], room[:, 2, 1:41]
    x.copy_(rand(9, 50)), residual.copy_(rand(9, 40, seed=1))
    weight = torch.full((80, 90), torch.nan, dtype=torch.float16, device=DEVICE)[::2, 7:57]
    weight.copy_(rand(40, 50, seed=2) * 0.1)
    compare(x, weight, rand(40), rand(40, seed=3), rand(40, seed=4), residual)


@pytest.mark.parametrize("memory", [99 << 10, 227 << 10])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 128, 32768])
@pytest.mark.parametrize("n", [1, 64, 512, 768, 1024])
def test_the_default_fits(m, n, dtype, memory, monkeypatch):
    monkeypatch.setattr(template.select, "shared_memory", lambda device: memory)
    params = template.default(m, n, dtype, DEVICE)
    assert template.fits(params, n, dtype, shared_memory=memory)
    assert all(params[name] in values for name, values in template.SPACE.items())


def test_a_row_that_is_too_long_fits_nowhere():
    params = {name: values[0] for name, values in template.SPACE.items()}
    assert not template.fits(params, 1025, torch.float16, shared_memory=227 << 10)


def test_a_weight_beyond_32_bit_offsets_is_refused():
    weight = torch.empty(1, dtype=torch.float16, device=DEVICE).as_strided((1, 1 << 22), (1, 0))
    x = SimpleNamespace(shape=(1, 1 << 22), dtype=torch.float16, device=weight.device)
    template.check_weight(weight, x)
    huge = torch.empty(1024, 1 << 22, dtype=torch.float16, device="meta")
    x.device = huge.device
    with pytest.raises(UnsupportedError, match="apart"):
        template.check_weight(huge, x)


@pytest.mark.parametrize("change, message", [
    ({"x": torch.zeros(2, 3, 16)}, "flatten"),
    ({"weight": torch.zeros(16, 8)}, "weight.T"),
    ({"weight": torch.zeros(8, 16).half()}, "convert"),
    ({"weight": torch.zeros(1025, 16), "norm_weight": torch.zeros(1025)}, "apart"),
    ({"norm_weight": torch.zeros(16)}, "norm_weight must be 8"),
    ({"residual": torch.zeros(4, 16)}, "expand"),
    ({"weight": torch.zeros(8, 16, requires_grad=True)}, "no_grad"),
], ids=lambda v: v if isinstance(v, str) else "")  # fmt: skip
def test_errors_name_the_way_out(change, message):
    given = {"x": torch.zeros(4, 16), "weight": torch.zeros(8, 16), "norm_weight": torch.zeros(8)}
    with pytest.raises(UnsupportedError, match=message):
        template.gemm_norm(**given | change, eps=1e-5)


@pytest.mark.timeout(600)
def test_compiles_and_fits_into_shared_memory():
    assert not misfits("gemm_norm")
