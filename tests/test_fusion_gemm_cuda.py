"""Linear layers by the CUDA kernels for Hopper, against fp64; what needs no GPU, without one."""

from functools import partial

import pytest
import torch
from gemms import DEVICE, assert_near, matrix
from hypothesis import given
from hypothesis import strategies as st
from transformers.activations import ACT2FN

from stof_hf.errors import StofWarning, UnsupportedError
from stof_hf.fusion.layer_ops import SEGMENTS
from stof_hf.fusion.templates import gemm_cuda, gemm_hopper, gemm_split_k
from stof_hf.fusion.templates.gemm_cuda import ACTIVATIONS, serves
from stof_hf.kernels.constant import constant_weights

pytestmark = pytest.mark.usefixtures("poisoned_empty")
HALVES = (torch.float16, torch.bfloat16)
#: Kernels by their templates, and a set of parameters that each may be given.
KERNELS = {
    "gemm_hopper": (gemm_hopper, {"block_n": 128, "group": 8}),
    "gemm_split_k": (gemm_split_k, {"block_m": 128, "block_n": 64, "split": 1, "stages": 4}),
}
on_hopper = pytest.mark.skipif(
    DEVICE.type != "cuda" or torch.cuda.get_device_capability()[0] != 9, reason="no Hopper GPU"
)
of_both = pytest.mark.parametrize("name", KERNELS)


def compute(name, x, w, bias=None, residual=None, **options):
    return KERNELS[name][0].Gemm(w, bias, **options)(x, residual)


def oracle(x, w, bias=None, residual=None, activation="none", gated=False):
    y = x.double() @ w.double().T
    function = ACT2FN[activation] if activation != "none" else torch.nn.Identity()
    if gated:
        gate, up = y.chunk(2, -1)
        return function(gate) * up
    if bias is not None:
        y += bias.double()
    y = function(y)
    return y if residual is None else y + residual.double()


lengths = st.one_of(st.integers(1, 700), st.sampled_from([16, 64, 127, 128, 129, 256, 257, 512]))
eights = st.integers(1, 90).map(lambda i: 8 * i)
FORMS = ("plain", "gated", "residual", "transposed", "transposed residual")


def problem(m, n, k, dtype, form, biased, amid_nan):
    """x, weight, bias and residual, as a form has them."""
    gated, residual = form == "gated", "residual" in form
    x = matrix(m, k, dtype, amid_nan=amid_nan)
    w = matrix(n * (1 + gated), k, dtype, scale=k**-0.5)
    if "transposed" in form:
        w = w.t().contiguous().t()
    bias = matrix(1, n, dtype)[0] if biased and not gated else None
    return x, w, bias, matrix(m, n, dtype, amid_nan=amid_nan) if residual else None


@pytest.mark.gpu
@on_hopper
@given(
    lengths, eights, eights, st.sampled_from(HALVES), st.sampled_from(list(ACTIVATIONS)),
    st.sampled_from(FORMS), st.booleans(), st.booleans(),
    st.sampled_from(gemm_hopper.SPACE["block_n"]), st.sampled_from(gemm_hopper.SPACE["group"]),
)  # fmt: skip
def test_random_shapes_and_options(m, n, k, dtype, act, form, biased, amid_nan, block_n, group):
    given = problem(m, n, k, dtype, form, biased, amid_nan)
    options = {"activation": act, "gated": form == "gated"}
    params = {"block_n": block_n, "group": group}
    got = compute("gemm_hopper", *given, **options, params=params)
    assert got.shape == (m, n) and got.dtype == dtype
    assert_near(got, oracle(*given, **options))


@pytest.mark.gpu
@on_hopper
@given(
    lengths, eights, st.integers(1, 300).map(lambda i: 8 * i), st.sampled_from(HALVES),
    st.sampled_from(list(ACTIVATIONS)), st.sampled_from(FORMS), st.booleans(), st.booleans(),
    st.fixed_dictionaries({k: st.sampled_from(v) for k, v in gemm_split_k.SPACE.items()}),
    st.booleans(),
)  # fmt: skip
def test_random_shapes_of_shared_depth(
    m, n, k, dtype, act, form, biased, amid_nan, params, ahead
):  # fmt: skip
    given = problem(m, n, k, dtype, form, biased, amid_nan)
    options = {"activation": act, "gated": form == "gated"}
    memory = torch.cuda.get_device_properties(DEVICE).shared_memory_per_block_optin
    if not gemm_split_k.fits(params, k, shared_memory=memory):
        params = None
    torch.cuda.synchronize()
    if ahead:
        with constant_weights():
            got = compute("gemm_split_k", *given, **options, params=params)
    else:
        got = compute("gemm_split_k", *given, **options, params=params)
    assert got.shape == (m, n) and got.dtype == dtype
    assert_near(got, oracle(*given, **options))


@pytest.mark.gpu
@on_hopper
@of_both
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_those_of_transformers_far_from_zero_too(name, activation, dtype):
    x = torch.cat([torch.linspace(-30, 30, 8000), torch.linspace(-6, 6, 8000)]).view(-1, 16)
    x = x.to(DEVICE, dtype)
    one = torch.eye(16, device=DEVICE, dtype=dtype)
    got = compute(name, x, one, activation=activation)
    want = oracle(x, one, activation=activation)
    torch.testing.assert_close(
        got.double(), want, atol=5e-7, rtol=6e-4 if dtype == torch.float16 else 4.5e-3
    )


@pytest.mark.gpu
@on_hopper
@of_both
def test_nan_stays_nan_and_infinity_infinity(name):
    x = torch.tensor([[torch.nan], [torch.inf], [-torch.inf], [-6e4]], device=DEVICE).half()
    one = torch.eye(8, device=DEVICE).half()[:, :1].repeat(1, 8)
    for activation in ACTIVATIONS:
        y = compute(name, x.repeat(1, 8) / 8, one, activation=activation)[:, 0]
        assert y[0].isnan() and y[1] == torch.inf
        if activation != "none":
            assert y[3] == 0


@pytest.mark.gpu
@on_hopper
@of_both
def test_the_shapes_of_models(name):
    many = ((4096, 3072, 768), (4096, 768, 3072), (8200, 4096, 1024), (40000, 1024, 64))
    few = ((128, 2304, 768), (128, 768, 3072), (65, 3072, 768), (512, 1024, 4096), (1, 1024, 4096))
    for m, n, k in few if name == "gemm_split_k" else many:
        x, w = matrix(m, k, torch.float16), matrix(n, k, torch.float16, scale=k**-0.5)
        for weight in w, w.t().contiguous().t():
            assert_near(compute(name, x, weight), oracle(x, w))


@pytest.mark.gpu
@on_hopper
@of_both
def test_a_graph_repeats_it(name):
    """Also where weights are loaded ahead, and each kernel computes what the one in front wrote."""
    x, w = matrix(700, 512, torch.float16), matrix(512, 512, torch.float16, scale=512**-0.5)
    call = KERNELS[name][0].Gemm(w, matrix(1, 512, torch.float16)[0], activation="gelu")
    call(x)
    graph = torch.cuda.CUDAGraph()
    with constant_weights(), torch.cuda.graph(graph):
        first, again = call(x), call(x)
        out = first
        for _ in range(20):
            out = call(out)
    for _ in range(3):
        x.copy_(matrix(700, 512, torch.float16))
        w.copy_(matrix(512, 512, torch.float16, scale=512**-0.5))
        graph.replay()
        want = oracle(x, w, call.bias, activation="gelu")
        assert_near(first, want)
        assert torch.equal(first, again)
        one_by_one = first
        for _ in range(20):
            one_by_one = call(one_by_one)
        assert torch.equal(out, one_by_one)


@pytest.mark.gpu
@on_hopper
def test_where_it_overflows_it_is_clamped():
    w = torch.eye(64, device=DEVICE).half()
    x = torch.full((130, 64), 6e4, device=DEVICE).half()
    residual = torch.zeros_like(x)
    clamped = gemm_split_k.ClampedGemm(w)
    assert torch.equal(clamped(x, residual), x)
    # One infinite element, in each place in turn, and everything is brought between limits.
    limit = torch.finfo(torch.float16).max - 1000
    for row, column in ((0, 0), (15, 63), (129, 7), (77, 32)):
        residual.zero_()[row, column] = 6e4
        got = clamped(x * 1.08, residual)
        want = x * 1.08
        want[row, column] = limit
        assert torch.equal(got, want.clamp(-limit, limit))
    with pytest.raises(UnsupportedError, match="float16"):
        gemm_split_k.ClampedGemm(w.bfloat16())


@pytest.mark.gpu
@on_hopper
@of_both
@pytest.mark.parametrize("change, message", [
    ({"x": (8, 24)}, "does not fit a weight"),
    ({"x": (8, 32, 1)}, "does not fit a weight"),
    ({"w": (47, 32)}, "multiples of 8"),
    ({"w": (48, 33)}, "multiples of 8"),
    ({"bias": (47,)}, "a bias"),
    ({"residual": (8, 47)}, "a residual"),
    ({"activation": "gelu_10"}, "'gelu_10'"),
    ({"params": {"block_n": 65}}, "no kernel for"),
], ids=lambda v: v if isinstance(v, str) else "-".join(v))  # fmt: skip
def test_refuses(name, change, message):
    shapes = {"x": (8, 32), "w": (48, 32), "bias": (48,), "residual": (8, 48)}
    given = {
        name: torch.zeros(change.get(name, shape), device=DEVICE, dtype=torch.float16)
        for name, shape in shapes.items()
    } | {name: value for name, value in change.items() if name not in shapes}
    with pytest.raises(UnsupportedError, match=message):
        compute(name, **given)


@pytest.mark.gpu
@on_hopper
@of_both
def test_refuses_gradients_and_a_gate_with_more(name):
    call = partial(compute, name)
    x, w = matrix(8, 32, torch.float16), matrix(48, 32, torch.float16).requires_grad_()
    with pytest.raises(UnsupportedError, match="no_grad"):
        call(x, w)
    with torch.no_grad():
        assert call(x, w, gated=True).shape == (8, 24)
        assert call(x[:0], w).shape == (0, 48)
        with pytest.raises(UnsupportedError, match="a bias"):
            call(x, w, w[:24, 0].contiguous(), gated=True)


@of_both
def test_which_weights_it_serves(name):
    family, w = KERNELS[name][0].Gemm.family, torch.zeros(64, 32, dtype=torch.float16)
    assert serves(family, w) and serves(family, w, gated=True)
    assert serves(family, w[:48], gated=True) and not serves(family, w[:56], gated=True)
    assert serves(family, w.t()) and not serves(family, w.t(), gated=True)
    for other in w.float(), w[:, :20], w[:60], w[:, 4:28], w[::2, ::2], w.t()[4:28]:
        assert not serves(family, other)


@pytest.mark.parametrize("gated", [False, True])
def test_defaults_are_of_the_space(gated):
    device, memory = torch.device("cpu"), 227 << 10
    for m, n in ((512, 8), (4096, 768), (4096, 3072), (32768, 4096), (5000, 30000)):
        params = gemm_hopper.default(m, n, device, gated=gated)
        assert params.keys() == gemm_hopper.SPACE.keys() and gemm_hopper.fits(params)
    assert not gemm_hopper.fits({"block_n": 64, "group": 8})
    for m, n, k in ((1, 8, 8), (128, 768, 3072), (65, 3072, 768), (512, 768, 768), (999, 9000, 64)):
        params = gemm_split_k.default(m, n, k, device, gated=gated)
        assert params.keys() == gemm_split_k.SPACE.keys()
        assert gemm_split_k.fits(params, k, shared_memory=memory)
    most = {name: max(values) for name, values in gemm_split_k.SPACE.items()}
    assert not gemm_split_k.fits(most, 4096, shared_memory=memory)
    assert not gemm_split_k.fits(params | {"split": 2}, 64, shared_memory=memory)


@of_both
def test_elsewhere_it_is_refused(name):
    if DEVICE.type == "cpu":
        with pytest.raises(UnsupportedError, match="Hopper"):
            compute(name, *(torch.zeros(8, 8, dtype=torch.float16) for _ in range(2)))


def test_without_a_compiler_there_is_one_warning(monkeypatch):
    from stof_hf.errors import BuildError

    def fails(*_):
        raise BuildError("no nvcc")

    monkeypatch.setattr(gemm_cuda.cuda_build, "library", fails)
    gemm_cuda.library.cache_clear()
    with pytest.warns(StofWarning, match="do without their CUDA kernel.*no nvcc"):
        assert gemm_cuda.library("gemm", torch.float16, 0) is None
    assert gemm_cuda.library("gemm", torch.float16, 0) is None
    gemm_cuda.library.cache_clear()


@of_both
def test_products_of_a_layer_may_take_it(name):
    taken = {names for names, templates in SEGMENTS.items() if name in templates}
    assert ("gemm", "bias", "act") in taken and ("gemm", "gate") in taken
    assert all(names[0] == "gemm" for names in taken)
