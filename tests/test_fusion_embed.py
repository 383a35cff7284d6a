"""Rows of tables, added up and normalised, against an fp64 oracle."""

import pytest
import torch
from compiling import misfits
from hypothesis import given
from hypothesis import strategies as st
from test_fusion_norm import DEVICE, DTYPES, TOLERANCE, fitting, oracle, rand

from stof_hf.errors import UnsupportedError
from stof_hf.fusion.parts import Norm

template = pytest.importorskip("stof_hf.fusion.templates.embed", reason="Triton is not installed")

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def counts(*shape, below, dtype=torch.int64, seed=0):
    drawn = torch.randint(0, below, shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(DEVICE, dtype)


def compare(tables, ids, norm, params=None):
    got = template.embed(tables, ids, norm, params=params)
    total = sum(t.double()[i.long()] for t, i in zip(tables, ids, strict=True)).flatten(0, 1)
    want = oracle(total, norm.weight, norm.bias, norm.eps, norm.rms, 0.0)
    near = TOLERANCE[tables[0].dtype]
    torch.testing.assert_close(got.double(), want, atol=near, rtol=near)
    assert got.dtype == tables[0].dtype and got.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of_ids", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_options(dtype, of_ids, rms, count):
    n = 100
    tables = [rand(v, n, dtype=dtype, seed=v) for v in (97, 2, 50)][:count]
    ids = [counts(*shape, below=below, dtype=of_ids)
           for shape, below in (((2, 9), 97), ((2, 1), 2), ((1, 9), 50))][:count]  # fmt: skip
    bias = None if rms else rand(n, dtype=dtype, seed=2)
    compare(tables, ids, Norm(rand(n, dtype=dtype, seed=1), bias, 1e-5, rms))


@given(
    st.integers(1, 5), st.integers(1, 20), st.integers(1, 300), st.sampled_from(DTYPES), st.data()
)
def test_random_shapes_and_parameters(b, s, n, dtype, data):
    tables = [rand(v, n, dtype=dtype, seed=v) for v in (11, 3, 40)]
    sizes = [(b, s), *(data.draw(st.sampled_from([(b, s), (1, s), (b, 1), (1, 1)])) for _ in "ab")]
    ids = [counts(*size, below=len(t), seed=n) for size, t in zip(sizes, tables, strict=True)]
    params = data.draw(fitting(template, n))
    compare(tables, ids, Norm(rand(n), rand(n, seed=1), 1e-5, False), params)


def test_ids_that_lie_apart():
    """As a slice of a buffer, or transposed; what lies between is no id."""
    room = torch.full((9, 2, 3), -(10**12), device=DEVICE)
    room[:, :, 1] = counts(9, 2, below=97)
    ids = room[:, :, 1].T
    compare([rand(97, 64), rand(97, 64, seed=1)], [ids, ids[:1]], Norm(rand(64), None, 1e-5, False))


@pytest.mark.parametrize("wrong", [-1, 50, 2**40])
@pytest.mark.parametrize("where", [0, 1])
def test_ids_outside_of_a_table_give_nan_and_read_nothing(wrong, where):
    room = torch.ones(150, 64, device=DEVICE)
    tables = [room[50:100], rand(50, 64)]
    ids = [counts(2, 9, below=50) for _ in tables]
    norm = Norm(rand(64), rand(64, seed=1), 1e-5, False)
    want = template.embed(tables, ids, norm).view(2, 9, 64)
    ids[where][1, 3] = wrong
    got = template.embed(tables, ids, norm).view(2, 9, 64)
    assert got[1, 3].isnan().all()
    got[1, 3] = want[1, 3]
    assert torch.equal(got, want)


def test_no_rows():
    ids = torch.zeros(2, 0, dtype=torch.int64, device=DEVICE)
    assert template.embed([rand(5, 8)], [ids], Norm(rand(8), None, 1e-5, False)).shape == (0, 8)


IDS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize("change, message", [
    ({"tables": []}, "0 tables"),
    ({"tables": [torch.zeros(4, 8)] * 4, "ids": [IDS] * 4}, "up to 3"),
    ({"tables": [torch.zeros(4, 16385)]}, "unfused"),
    ({"tables": [torch.zeros(8, 4).T]}, "contiguous"),
    ({"tables": [torch.zeros(8, 8)[::2]]}, "lie apart"),
    ({"tables": [torch.zeros(4, 8, dtype=torch.float64)]}, "float16"),
    ({"tables": [torch.zeros(4, 8), torch.zeros(4, 8).half()], "ids": [IDS] * 2}, "the first has"),
    ({"tables": [torch.zeros(4, 8, requires_grad=True)]}, "no_grad"),
    ({"ids": [IDS.float()]}, "int64 or int32"),
    ({"ids": [IDS[0]]}, "do not fit"),
    ({"tables": [torch.zeros(4, 8)] * 2, "ids": [IDS, IDS[:, :2]]}, "do not fit"),
    ({"norm": Norm(torch.zeros(7), None, 1e-5, False)}, "norm_weight must be 8"),
], ids=lambda v: v if isinstance(v, str) else "")  # fmt: skip
def test_errors_name_the_way_out(change, message):
    norm = Norm(torch.zeros(8), None, 1e-5, False)
    given = {"tables": [torch.zeros(4, 8)], "ids": [IDS], "norm": norm} | change
    with pytest.raises(UnsupportedError, match=message):
        template.embed(**given)


@pytest.mark.timeout(600)
def test_compiles_and_fits_into_shared_memory():
    assert not misfits("embed")
