"""Bias + residual + norm against an fp64 oracle."""

from itertools import product

import pytest
import torch
from compiling import misfits
from hypothesis import given
from hypothesis import strategies as st

from stof_hf.errors import UnsupportedError

template = pytest.importorskip("stof_hf.fusion.templates.norm", reason="Triton is not installed")

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Relative to 1; an output is rounded once.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def rand(*shape, dtype=torch.float32, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(DEVICE, dtype)


def fitting(template, *sizes):
    """Any parameters that a search may draw."""
    drawn = product(*template.SPACE.values())
    space = [dict(zip(template.SPACE, values, strict=True)) for values in drawn]
    return st.sampled_from([p for p in space if template.fits(p, *sizes, shared_memory=99 << 10)])


def oracle(x, weight, shift, eps, rms, offset):
    """The norm of fp64 rows."""
    if not rms:
        x = x - x.mean(1, keepdim=True)
    y = x * torch.rsqrt(x.square().mean(1, keepdim=True) + eps) * (weight.double() + offset)
    return y if shift is None else y + shift.double()


def compare(x, weight, shift=None, bias=None, residual=None, *, eps=1e-5, rms=False, offset=0.0,
            params=None):  # fmt: skip
    kept = [None if t is None else t.clone() for t in (x, residual)]
    rest = {"eps": eps, "rms": rms, "offset": offset, "params": params}
    y, total = template.norm(x, weight, shift, bias, residual, return_sum=True, **rest)
    want = sum(t.double() for t in (x, bias, residual) if t is not None)
    near = {"atol": TOLERANCE[x.dtype], "rtol": TOLERANCE[x.dtype]}
    torch.testing.assert_close(total.double(), want, **near)
    torch.testing.assert_close(y.double(), oracle(want, weight, shift, eps, rms, offset), **near)
    for out in (y, total):
        assert out.dtype == x.dtype and out.shape == x.shape and out.is_contiguous()
    assert torch.equal(template.norm(x, weight, shift, bias, residual, **rest), y)
    for tensor, before in zip((x, residual), kept, strict=True):
        assert before is None or torch.equal(tensor, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("bias, residual", [(False, False), (True, False), (False, True), (1, 1)])
def test_options(dtype, rms, shift, bias, residual):
    n = 100
    compare(
        rand(7, n, dtype=dtype), rand(n, dtype=dtype, seed=1),
        rand(n, dtype=dtype, seed=2) if shift else None,
        rand(n, dtype=dtype, seed=3) if bias else None,
        rand(7, n, dtype=dtype, seed=4) if residual else None,
        rms=rms, offset=1.0 if rms and shift else 0.0,
    )  # fmt: skip


@given(st.integers(1, 40), st.integers(1, 300), st.sampled_from(DTYPES), st.booleans(), st.data())
def test_random_shapes_and_parameters(m, n, dtype, rms, data):
    x, residual = rand(m, n, dtype=dtype), rand(m, n, dtype=dtype, seed=2)
    shift = None if rms else rand(n, seed=1)
    params = data.draw(fitting(template, n))
    compare(x, rand(n), shift, residual=residual, rms=rms, params=params)


@pytest.mark.parametrize("n", [1, 16383, 16384])
def test_the_shortest_and_the_longest_rows(n):
    compare(rand(3, n), rand(n), rand(n, seed=1))


def test_no_rows():
    y, total = template.norm(rand(0, 8), rand(8), eps=1e-5, return_sum=True)
    assert y.shape == total.shape == (0, 8)


def test_rows_that_lie_apart_and_vectors_of_other_dtypes():
    """What lies between rows is NaN, and what was not asked for is never read."""
    room = torch.full((5, 3, 70), torch.nan, dtype=torch.float16, device=DEVICE)
    x, residual = room[:, 0, 3:53], room[:, 2, 1:51]
    x.copy_(rand(5, 50)), residual.copy_(rand(5, 50, seed=1))
    compare(x, rand(50), rand(50, dtype=torch.bfloat16, seed=2), rand(50, seed=3), residual)
    # One row added to all, as position embeddings are.
    compare(x, rand(50), residual=residual[:1].expand(5, 50))


def test_a_mean_far_from_zero_does_not_cancel():
    """E[x^2] - E[x]^2 would lose all of the variance here; rounding of the mean remains."""
    x, ones = rand(4, 512) + 4096, torch.ones(512, device=DEVICE)
    want = oracle(x.double(), ones, None, 1e-5, False, 0.0)
    got = template.norm(x, ones, eps=1e-5).double()
    torch.testing.assert_close(got, want, atol=5e-4, rtol=1e-4)


def test_half_precision_does_not_overflow_within():
    """Squares of the row exceed the largest fp16 number, the norm does not."""
    compare(rand(4, 256, dtype=torch.float16) * 1000, rand(256), rms=True)


@pytest.mark.parametrize("m", [1, 128, 32768])
@pytest.mark.parametrize("n", [1, 64, 768, 5120, 16384])
def test_the_default_fits(m, n):
    params = template.default(m, n, DEVICE)
    assert template.fits(params, n, shared_memory=99 << 10)
    assert all(params[name] in values for name, values in template.SPACE.items())


@pytest.mark.parametrize("change, message", [
    ({"x": torch.zeros(2, 3, 8)}, "flatten"),
    ({"x": torch.zeros(8, 4).T}, "contiguous"),
    ({"x": torch.zeros(4, 8, dtype=torch.float64)}, "float16"),
    ({"x": torch.zeros(2, 16385)}, "unfused"),
    ({"norm_weight": torch.zeros(7)}, "norm_weight must be 8"),
    ({"bias": torch.zeros(16)[::2]}, "gaps"),
    ({"bias": torch.zeros(8, dtype=torch.int32)}, "floats"),
    ({"residual": torch.zeros(1, 8)}, "expand"),
    ({"residual": torch.zeros(4, 8).half()}, "residual.to"),
    ({"norm_weight": torch.zeros(8, requires_grad=True)}, "no_grad"),
], ids=lambda v: v if isinstance(v, str) else "")  # fmt: skip
def test_errors_name_the_way_out(change, message):
    given = {"x": torch.zeros(4, 8), "norm_weight": torch.zeros(8)} | change
    with pytest.raises(UnsupportedError, match=message):
        template.norm(**given, eps=1e-5)


def test_weights_that_need_gradients_are_taken_where_none_are_computed():
    with torch.no_grad():
        template.norm(rand(2, 8), rand(8).requires_grad_(), eps=1e-5)


@pytest.mark.timeout(600)
def test_compiles_and_fits_into_shared_memory():
    assert not misfits("norm")
