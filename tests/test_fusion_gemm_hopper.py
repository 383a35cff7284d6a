"""Linear layers by the CUDA kernel for Hopper, against fp64; what needs no GPU, without one."""

import pytest
import torch
from gemms import DEVICE, assert_near, matrix
from hypothesis import given
from hypothesis import strategies as st
from transformers.activations import ACT2FN

from stof_hf.errors import StofWarning, UnsupportedError
from stof_hf.fusion.layer_ops import SEGMENTS
from stof_hf.fusion.templates import gemm_hopper as template
from stof_hf.fusion.templates.gemm_hopper import ACTIVATIONS, SPACE, Gemm, gemm_hopper, serves

pytestmark = pytest.mark.usefixtures("poisoned_empty")
HALVES = (torch.float16, torch.bfloat16)
on_hopper = pytest.mark.skipif(
    DEVICE.type != "cuda" or torch.cuda.get_device_capability()[0] != 9, reason="no Hopper GPU"
)


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


lengths = st.one_of(st.integers(1, 700), st.sampled_from([127, 128, 129, 256, 257, 512]))
eights = st.integers(1, 90).map(lambda i: 8 * i)


@pytest.mark.gpu
@on_hopper
@given(
    lengths, eights, eights, st.sampled_from(HALVES), st.sampled_from(list(ACTIVATIONS)),
    st.sampled_from(["plain", "gated", "residual"]), st.booleans(), st.booleans(),
    st.sampled_from(SPACE["block_n"]), st.sampled_from(SPACE["group"]),
)  # fmt: skip
def test_random_shapes_and_options(m, n, k, dtype, act, form, biased, amid_nan, block_n, group):
    x = matrix(m, k, dtype, amid_nan=amid_nan)
    w = matrix(n * (1 + (form == "gated")), k, dtype, scale=k**-0.5)
    bias = matrix(1, n, dtype)[0] if biased and form != "gated" else None
    residual = matrix(m, n, dtype, amid_nan=amid_nan) if form == "residual" else None
    options = {"activation": act, "gated": form == "gated"}
    params = {"block_n": block_n, "group": group}
    got = gemm_hopper(x, w, bias, residual, **options, params=params)
    assert got.shape == (m, n) and got.dtype == dtype
    assert_near(got, oracle(x, w, bias, residual, **options))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_those_of_transformers_far_from_zero_too(activation, dtype):
    x = torch.cat([torch.linspace(-30, 30, 8000), torch.linspace(-6, 6, 8000)]).view(-1, 16)
    x = x.to(DEVICE, dtype)
    got = gemm_hopper(x, torch.eye(16, device=DEVICE, dtype=dtype), activation=activation)
    want = oracle(x, torch.eye(16, device=DEVICE), activation=activation)
    torch.testing.assert_close(
        got.double(), want, atol=5e-7, rtol=6e-4 if dtype == torch.float16 else 4.5e-3
    )


@pytest.mark.gpu
@on_hopper
def test_nan_stays_nan_and_infinity_infinity():
    x = torch.tensor([[torch.nan], [torch.inf], [-torch.inf], [-6e4]], device=DEVICE).half()
    one = torch.eye(8, device=DEVICE).half()[:, :1].repeat(1, 8)
    for activation in ACTIVATIONS:
        y = gemm_hopper(x.repeat(1, 8) / 8, one, activation=activation)[:, 0]
        assert y[0].isnan() and y[1] == torch.inf
        if activation != "none":
            assert y[3] == 0


@pytest.mark.gpu
@on_hopper
def test_the_shapes_of_models():
    for m, n, k in ((4096, 3072, 768), (4096, 768, 3072), (8200, 4096, 1024), (40000, 1024, 64)):
        x, w = matrix(m, k, torch.float16), matrix(n, k, torch.float16, scale=k**-0.5)
        for block_n in SPACE["block_n"]:
            got = gemm_hopper(x, w, params={"block_n": block_n, "group": 8})
            assert_near(got, oracle(x, w))


@pytest.mark.gpu
@on_hopper
def test_a_graph_repeats_it():
    x, w = matrix(700, 512, torch.float16), matrix(384, 512, torch.float16, scale=512**-0.5)
    call = Gemm(w, matrix(1, 384, torch.float16)[0], activation="gelu")
    call(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first, second = call(x), call(x)
    x.copy_(matrix(700, 512, torch.float16))
    graph.replay()
    assert_near(first, oracle(x, w, call.bias, activation="gelu"))
    assert torch.equal(first, second)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("change, message", [
    ({"x": (8, 24)}, "does not fit a weight"),
    ({"x": (8, 32, 1)}, "does not fit a weight"),
    ({"w": (47, 32)}, "multiples of 8"),
    ({"w": (48, 33)}, "multiples of 8"),
    ({"bias": (47,)}, "a bias"),
    ({"residual": (8, 47)}, "a residual"),
    ({"activation": "gelu_10"}, "'gelu_10'"),
    ({"params": {"block_n": 64, "group": 8}}, "no kernel for"),
], ids=lambda v: v if isinstance(v, str) else "-".join(v))  # fmt: skip
def test_refuses(change, message):
    shapes = {"x": (8, 32), "w": (48, 32), "bias": (48,), "residual": (8, 48)}
    given = {
        name: torch.zeros(change.get(name, shape), device=DEVICE, dtype=torch.float16)
        for name, shape in shapes.items()
    } | {name: value for name, value in change.items() if name not in shapes}
    with pytest.raises(UnsupportedError, match=message):
        gemm_hopper(**given)


@pytest.mark.gpu
@on_hopper
def test_refuses_gradients_and_a_gate_with_more():
    x, w = matrix(8, 32, torch.float16), matrix(48, 32, torch.float16).requires_grad_()
    with pytest.raises(UnsupportedError, match="no_grad"):
        gemm_hopper(x, w)
    with torch.no_grad():
        assert gemm_hopper(x, w, gated=True).shape == (8, 24)
        assert gemm_hopper(x[:0], w).shape == (0, 48)
        with pytest.raises(UnsupportedError, match="a bias"):
            gemm_hopper(x, w, w[:24, 0].contiguous(), gated=True)
        with pytest.raises(UnsupportedError, match="a residual"):
            gemm_hopper(x, w, residual=matrix(8, 24, torch.float16), gated=True)


def test_which_weights_it_serves():
    w = torch.zeros(64, 32, dtype=torch.float16)
    assert serves(w) and serves(w, gated=True)
    assert serves(w[:48], gated=True) and not serves(w[:56], gated=True)
    assert not serves(w.float())
    assert not serves(w.t())
    assert not serves(w[:, :20])
    assert not serves(w[:60])
    assert not serves(w[:, 4:28])


@pytest.mark.parametrize("gated", [False, True])
def test_defaults_are_of_the_space(gated):
    for m, n in ((512, 8), (4096, 768), (4096, 3072), (32768, 4096), (5000, 30000)):
        params = template.default(m, n, torch.device("cpu"), gated=gated)
        assert params.keys() == SPACE.keys() and template.fits(params)
    assert not template.fits({"block_n": 64, "group": 8})


def test_elsewhere_it_is_refused():
    if DEVICE.type == "cpu":
        with pytest.raises(UnsupportedError, match="Hopper"):
            gemm_hopper(*(torch.zeros(8, 8, dtype=torch.float16) for _ in range(2)))


def test_without_a_compiler_there_is_one_warning(monkeypatch):
    from stof_hf.errors import BuildError

    def fails(*_):
        raise BuildError("no nvcc")

    monkeypatch.setattr(template.cuda_build, "library", fails)
    template._library.cache_clear()
    with pytest.warns(StofWarning, match="do without their CUDA kernel.*no nvcc"):
        assert template._library(torch.float16, 0) is None
    assert template._library(torch.float16, 0) is None
    template._library.cache_clear()


def test_products_of_a_layer_may_take_it():
    taken = {names for names, templates in SEGMENTS.items() if "gemm_hopper" in templates}
    assert ("gemm", "bias", "act") in taken and ("gemm", "gate") in taken
    assert all(names[0] == "gemm" for names in taken)
