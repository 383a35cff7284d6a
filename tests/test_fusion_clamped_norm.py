"""Residual + clamp + norm against PyTorch's operators in fp64."""

import pytest
import torch
from compiling import misfits
from hypothesis import given
from hypothesis import strategies as st
from test_fusion_norm import fitting, oracle, rand

from stof_hf.errors import UnsupportedError
from stof_hf.fusion.layer import clamp

template = pytest.importorskip(
    "stof_hf.fusion.templates.clamped_norm", reason="Triton is not installed"
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")

HALF = torch.float16
INF, NAN, MOST = float("inf"), float("nan"), 65504.0
NEAR = {"atol": 2e-3, "rtol": 2e-3, "equal_nan": True}


def compare(x, residual, weight, shift, rms, params=None):
    """Returns the sum."""
    kept = x.clone(), residual.clone()
    got, total = template.clamped_norm(x, residual, weight, shift, eps=1e-5, rms=rms, params=params)
    want = clamp(x + residual)
    torch.testing.assert_close(total, want, rtol=0, atol=0, equal_nan=True)
    # What is not clamped is normalised before it is rounded.
    clamped = (x + residual).isinf().any()
    exact = want.double() if clamped else x.double() + residual.double()
    of_sum = oracle(exact, weight, shift, 1e-5, rms, 0.0)
    torch.testing.assert_close(got.double(), of_sum, **NEAR)
    for out in (got, total):
        assert out.dtype == HALF and out.shape == x.shape and out.is_contiguous()
    for tensor, before in zip((x, residual), kept, strict=True):
        assert torch.equal(tensor.nan_to_num(7.0), before.nan_to_num(7.0))
    return total


@given(
    st.integers(1, 40), st.data(), st.booleans(), st.booleans(), st.booleans(),
    st.lists(st.sampled_from([INF, -INF, NAN, MOST, -MOST, 64600.0]), max_size=3),
)  # fmt: skip
def test_what_pytorch_computes(rows, data, rms, shifted, default, special):
    columns = data.draw(st.integers(1, 300))
    x, residual = (rand(rows, columns, dtype=HALF, seed=seed) for seed in (0, 1))
    for value in special:
        place = data.draw(st.integers(0, rows * columns - 1))
        residual.view(-1)[place] = value
    weight = rand(columns, seed=2)
    shift = rand(columns, seed=3) if shifted else None
    params = None if default else data.draw(fitting(template, columns))
    compare(x, residual, weight, shift, rms, params)


@pytest.mark.parametrize("place", [(0, 0), (149, 95), (70, 31), None])
@pytest.mark.parametrize("rows", [1, 4])
def test_one_element_clamps_all(place, rows, monkeypatch):
    """Of more blocks than there are flags: a program computes several."""
    monkeypatch.setattr(template, "FLAGS", 16)
    x = rand(150, 96, dtype=HALF)
    residual = torch.zeros_like(x)
    residual[3, 5] = 65472
    x[3, 5] = 16
    if place is not None:
        residual[place] = x[place] = 40000
    weight = rand(96, seed=2)
    total = compare(x, residual, weight, None, True, {"rows": rows, "warps": 4})
    assert total[3, 5] == (65472 + 16 if place is None else MOST - 1000)


def test_no_rows():
    x = torch.zeros(0, 8, device=rand(1).device, dtype=HALF)
    got, total = template.clamped_norm(x, x, x.new_zeros(8), eps=1e-5)
    assert got.shape == total.shape == (0, 8)


def test_what_it_does_not_take():
    x, weight = rand(4, 8, dtype=HALF), rand(8)
    for given_x, given_residual, given_weight, message in (
        (x.bfloat16(), x.bfloat16(), weight, "fp16"),
        (x, x.float(), weight, "fp16"),
        (x, rand(8, 4, dtype=HALF).T, weight, "contiguous"),
        (x, x[:2], weight, r"a residual must be \[4, 8\]"),
        (x, x, weight[:4], "norm_weight must be 8 floats"),
        (x, x, rand(8).requires_grad_(), "gradients"),
        (x[0], x[0], weight, "rows, columns"),
        (rand(1, 20000, dtype=HALF), rand(1, 20000, dtype=HALF), rand(20000), "registers"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            template.clamped_norm(given_x, given_residual, given_weight, eps=1e-5)


def test_kernels_compile():
    assert not misfits("clamped_norm add") and not misfits("clamped_norm clamp")
