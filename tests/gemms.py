"""What the tests of the GEMM templates share: inputs amid NaN, parameters, compilation."""

from __future__ import annotations

import itertools

import torch
from compiling import without_a_gpu, wrong
from hypothesis import strategies as st

from stof_hf.fusion.templates import common

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: Triton's interpreter truncates to bf16.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
PARAMS = [
    dict(zip(common.SPACE, values, strict=True))
    for values in itertools.product(*common.SPACE.values())
]

sizes = st.one_of(st.integers(1, 150), st.sampled_from([1, 16, 63, 64, 65, 128, 129]))
dtypes = st.sampled_from(list(TOLERANCE))


def matrix(rows, columns, dtype=torch.float32, *, amid_nan=False, transposed=False, scale=1.0):
    """Random [rows, columns]; amid_nan: a view of NaN on all sides, so that no row is aligned."""
    shape = (columns, rows) if transposed else (rows, columns)
    x = (torch.randn(shape) * scale).to(DEVICE, dtype)
    if amid_nan:
        wide = torch.full((shape[0] + 2, shape[1] + 5), torch.nan, dtype=dtype, device=DEVICE)
        wide[1:-1, 3:-2] = x
        x = wide[1:-1, 3:-2]
    return x.mT if transposed else x


def assert_near(got, want):
    """A result as close to its fp64 oracle as rounding it once allows."""
    assert want.dtype == torch.float64 and got.is_contiguous()
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


def assert_defaults_fit(module):
    """Defaults are part of the space and fit into the shared memory of every GPU named here."""
    for memory, m, n, dtype in itertools.product(
        (99 << 10, 163 << 10, 227 << 10), (1, 128, 1000, 32768), (64, 768, 4096), TOLERANCE
    ):
        common.default.cache_clear()
        with_memory, common.shared_memory = common.shared_memory, lambda device, size=memory: size
        try:
            params = module.default(m, n, 1024, dtype, DEVICE)
        finally:
            common.shared_memory = with_memory
            common.default.cache_clear()
        assert params.keys() == module.SPACE.keys()
        assert all(value in module.SPACE[name] for name, value in params.items()), params
        assert module.fits(params, dtype, shared_memory=memory), params


def assert_compiles(family, launches, *options):
    """Every launch that compile_fusion.py lists compiles and fits into shared memory."""
    cases = without_a_gpu("compile_fusion.py", family, *options)
    assert len(cases) == launches
    assert not wrong(cases), wrong(cases)
