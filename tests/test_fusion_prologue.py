"""A norm in front of the GEMM templates against fp64: by itself, and as layers have it."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stof_hf.errors import UnsupportedError

pytest.importorskip("triton", reason="Triton is not installed")
import test_fusion_gated  # noqa: E402
import test_fusion_gemm  # noqa: E402
import test_fusion_norm  # noqa: E402
import test_fusion_qkv  # noqa: E402
from gemms import DEVICE, PARAMS, assert_compiles, assert_near, dtypes, matrix, sizes  # noqa: E402
from layers import blocks, build, first, inputs_of  # noqa: E402

from stof_hf.fusion.fused import Choice, Weights, steps_of  # noqa: E402
from stof_hf.fusion.install import find, in_use, install  # noqa: E402
from stof_hf.fusion.layer_ops import SEGMENTS, Scheme, schemes  # noqa: E402
from stof_hf.fusion.parts import Norm  # noqa: E402
from stof_hf.fusion.runners import TEMPLATES  # noqa: E402
from stof_hf.fusion.templates import common  # noqa: E402
from stof_hf.fusion.templates.common import ACTIVATIONS  # noqa: E402
from stof_hf.fusion.templates.gated import gated  # noqa: E402
from stof_hf.fusion.templates.gemm import default, fits, gemm  # noqa: E402
from stof_hf.fusion.templates.qkv import qkv  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def make_norm(k, dtype, *, rms=False, shift=True, eps=1e-5):
    weight, bias = matrix(2, k, dtype)
    return Norm(weight, bias if shift and not rms else None, eps, rms)


def normed(x, norm):
    """Rounded to x's dtype as the norm's own result is, in fp64."""
    out = test_fusion_norm.oracle(x.double(), norm.weight, norm.bias, norm.eps, norm.rms, 0.0)
    return out.to(x.dtype).double()


@given(
    st.tuples(sizes, sizes, st.one_of(sizes, st.integers(300, 700))), dtypes,
    st.sampled_from(ACTIVATIONS), st.data(),
    st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.booleans()),
)  # fmt: skip
def test_random_shapes_and_options(shape, dtype, activation, data, flags):
    (m, n, k), (rms, shift, with_bias, transposed, amid_nan) = shape, flags
    fitting = [p for p in PARAMS if fits(p, dtype, shared_memory=227 << 10, norm=True)]
    params = data.draw(st.sampled_from([None, *fitting]))
    x = matrix(m, k, dtype, amid_nan=amid_nan, scale=3.0)
    x += 2
    w = matrix(n, k, dtype, amid_nan=amid_nan, transposed=transposed, scale=k**-0.5)
    bias = matrix(1, n, dtype)[0] if with_bias else None
    norm = make_norm(k, data.draw(st.sampled_from([dtype, torch.float32])), rms=rms, shift=shift)
    got = gemm(x, w, bias, activation=activation, norm=norm, params=params)
    assert got.shape == (m, n) and got.dtype == dtype
    assert_near(got, test_fusion_gemm.oracle(normed(x, norm), w, bias, None, activation))


@given(st.tuples(sizes, sizes, sizes), dtypes, st.data(), st.booleans())
def test_two_products(shape, dtype, data, rms):
    m, n, k = shape
    fitting = [p for p in PARAMS if common.fits(p, 2 * p["block_n"], dtype, 227 << 10, norm=True)]
    params = data.draw(st.sampled_from([None, *fitting]))
    x, norm = matrix(m, k, dtype), make_norm(k, dtype, rms=rms)
    gate, up = (matrix(n, k, dtype, scale=0.5 * k**-0.5) for _ in range(2))
    got = gated(x, gate, up, norm=norm, params=params)
    assert_near(got, test_fusion_gated.oracle(normed(x, norm), gate, up))


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotary"])
def test_heads(rotated, rms):
    m, heads, dim, k = 70, (4, 2), 16, 100
    x, norm = matrix(m, k, torch.float16), make_norm(k, torch.float16, rms=rms)
    w = matrix(sum(heads) * dim + heads[1] * dim, k, torch.float16, scale=k**-0.5)
    bias = matrix(1, len(w), torch.float16)[0]
    tables = [matrix(m, dim, scale=0.7) for _ in range(2)] if rotated else []
    options = dict(zip(("cos", "sin"), tables, strict=False))
    got = qkv(x, w, bias, heads=heads[0], kv_heads=heads[1], norm=norm, **options)
    assert_near(got, test_fusion_qkv.oracle(normed(x, norm), w, bias, *heads, *tables))


@pytest.mark.parametrize("k", [33, 64, 1000, 5000])
@pytest.mark.parametrize("what", ["mean", "outlier in front", "outlier behind"])
def test_statistics_do_not_cancel(what, k):
    """E[x^2] - E[x]^2, even with a row's first element subtracted, is off by percents here."""
    x = matrix(5, k)
    if what == "mean":
        x += 1000
    else:
        x[:, 0 if what.endswith("front") else -1] = 3e4
    eye, norm = (
        torch.eye(k, device=DEVICE)[:40],
        Norm(torch.ones(k, device=DEVICE), None, 1e-5, False),
    )
    want = test_fusion_norm.oracle(x.double(), norm.weight, None, 1e-5, False, 0.0)[:, :40]
    got = gemm(x, eye, norm=norm).double()
    # What rounding the mean to fp32 leaves, or an outlier of the rest.
    tolerance = 2e-4 if what == "mean" else 1e-5 * float(want[0, 1:].abs().max())
    torch.testing.assert_close(got[:, 1:], want[:, 1:], atol=tolerance, rtol=1e-4)


def test_rows_of_one_value_and_rows_that_are_not_numbers():
    k = 70
    x, norm = matrix(4, k), make_norm(k, torch.float32)
    x[0], x[1, 3], x[2, 69] = 5, torch.nan, torch.inf
    got = gemm(x, matrix(9, k), norm=norm)
    assert got[[0, 3]].isfinite().all() and got[1:3].isnan().all()


def test_defaults_fit():
    for memory, m, n, dtype in itertools.product(
        (99 << 10, 227 << 10), (1, 128, 32768), (64, 4096), (torch.float16, torch.float32)
    ):
        common.default.cache_clear()
        before, common.shared_memory = common.shared_memory, lambda device, size=memory: size
        try:
            params = default(m, n, 1024, dtype, DEVICE, norm=True)
        finally:
            common.shared_memory = before
            common.default.cache_clear()
        assert fits(params, dtype, shared_memory=memory, norm=True)


@pytest.mark.parametrize("change, message", [
    ({"weight": torch.ones(31, device=DEVICE)}, "norm_weight must be 32 floats"),
    ({"bias": torch.ones(32, device="meta")}, "norm_bias must be 32 floats"),
    ({"weight": torch.ones(64, device=DEVICE)[::2]}, r"norm_weight\.contiguous"),
    ({"weight": torch.ones(32, device=DEVICE, requires_grad=True)}, "no_grad"),
], ids=lambda v: v if isinstance(v, str) else "")  # fmt: skip
def test_refuses(change, message):
    norm = Norm(**{"weight": torch.ones(32, device=DEVICE), "bias": None, **change}, eps=0, rms=0)
    x, w = matrix(8, 32), matrix(16, 32)
    for call in (lambda: gemm(x, w, norm=norm), lambda: gated(x, w, w, norm=norm)):
        with pytest.raises(UnsupportedError, match=message):
            call()


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "llama with biases", "vit", "t5", "modernbert", "qwen2", "qwen3"]
)
def test_layers(name):
    """Both norms of a layer in front of what follows them, the residual taken from before."""
    model = build(name, "sdpa").to(DEVICE)
    inputs = {key: value.to(DEVICE) for key, value in inputs_of(model, 20).items()}
    want = first(model, inputs)
    choices = {}
    for found in blocks(model):
        if found.reason is not None:
            continue
        names = found.layer.names
        scheme = max(schemes(names), key=lambda s: (_joined(s), -len(s.sizes)))
        # ModernBERT's first layer begins without a norm.
        assert _joined(scheme) == names.count("norm")
        runs = {
            segment: (_template(segment), None) if segment[0] == "norm" else ("torch", {})
            for segment in scheme.segments
        }
        choices[found.kind] = {1: Choice.of(scheme, runs)}
    assert install(blocks(model), choices)
    # On a GPU, the second call repeats launches.
    for _ in range(2):
        torch.testing.assert_close(first(model, inputs), want, rtol=2e-4, atol=2e-4)
    assert all(len(used) > 1 and None not in used for used in in_use(model))


def _template(segment: tuple[str, ...]) -> str:
    """The first that is not for one row alone."""
    return next(name for name in SEGMENTS[segment] if TEMPLATES[name].rows != 1)


def _joined(scheme: Scheme) -> int:
    return sum(segment[0] == "norm" and len(segment) > 1 for segment in scheme.segments)


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_a_norm_behind_a_block_stays_there(name):
    """What it gives is a residual, too, which somebody has to write."""
    model = build(name).to(DEVICE)
    (found, *_) = find(model)
    scheme = next(s for s in schemes(found.layer.names) if _joined(s))
    choice = Choice(scheme.bits, tuple((_template(s), None) for s in scheme.segments))
    with pytest.raises(UnsupportedError, match=r"does not compute \[norm gemm"):
        steps_of(found.layer, choice, Weights.of(found.layer), (2, 20), DEVICE)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("family, launches", [("gemm", 25), ("gated", 12), ("qkv", 19)])
def test_compiles_and_fits_into_shared_memory(family, launches):
    assert_compiles(family, launches, "norm")
