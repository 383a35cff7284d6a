"""The clamp behind T5's parts against PyTorch's operators."""

import pytest
import torch
import transformers
from compiling import misfits
from hypothesis import given
from hypothesis import strategies as st
from layers import build, first, inputs_of

from stof_hf.errors import UnsupportedError
from stof_hf.fusion.fused import Choice
from stof_hf.fusion.install import find, install
from stof_hf.fusion.layer import clamp
from stof_hf.fusion.layer_ops import schemes

template = pytest.importorskip(
    "stof_hf.fusion.templates.overflow", reason="Triton is not installed"
)
from stof_hf.fusion.templates.gemm import gemm  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PARAMS = {"block_m": 64, "block_n": 64, "block_k": 32, "group_m": 4, "warps": 4, "stages": 2}
INF, NAN, MOST = float("inf"), float("nan"), 65504.0


@given(
    st.integers(0, 40), st.integers(1, 300), st.sampled_from(template.SPACE["elements"]),
    st.sampled_from(template.SPACE["warps"]),
    st.dictionaries(st.integers(0, 11999), st.sampled_from([INF, -INF, NAN, MOST, -MOST, 64600.0])),
)  # fmt: skip
def test_what_pytorch_computes(rows, columns, elements, warps, special):
    x = torch.randn(rows, columns).half()
    for place, value in special.items():
        if place < x.numel():
            x.view(-1)[place] = value
    x = x.to(DEVICE)
    want = clamp(x) if x.numel() else x.clone()
    params = {"elements": elements, "warps": warps}
    assert template.fits(params)
    got = template.overflow(x, params=params)
    assert got is x and torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
    assert torch.equal(got.isnan(), want.isnan())


@given(
    st.integers(0, 40), st.integers(1, 300), st.sampled_from(template.SPACE["elements"]),
    st.dictionaries(st.integers(0, 11999), st.sampled_from([INF, -INF, NAN, MOST, -MOST, 64600.0])),
)  # fmt: skip
def test_sums(rows, columns, elements, special):
    x, residual = (torch.randn(rows, columns).half() * 16 for _ in range(2))
    for place, value in special.items():
        if place < x.numel():
            residual.view(-1)[place] = value
    x, residual = x.to(DEVICE), residual.to(DEVICE)
    kept = x.clone()
    want = clamp(x + residual) if x.numel() else x
    got = template.overflow(x, residual, params={"elements": elements, "warps": 4})
    assert torch.equal(x, kept) and torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))


def test_more_elements_than_flags():
    x = torch.zeros(1025 * 1024 + 3, device=DEVICE, dtype=torch.float16)
    x[-1], x[0] = INF, MOST
    template.overflow(x, params={"elements": 1024, "warps": 4})
    assert x[0] == x[-1] == MOST - 1000 and not x[1:-1].any()


def test_what_it_does_not_take():
    with pytest.raises(UnsupportedError, match="fp16"):
        template.overflow(torch.zeros(4, 4))
    with pytest.raises(UnsupportedError, match="contiguous"):
        template.overflow(torch.zeros(4, 4).half().T[:3])
    with pytest.raises(UnsupportedError, match="gradients"):
        template.overflow(torch.zeros(4).half().requires_grad_())
    with pytest.raises(UnsupportedError, match=r"a residual must be \[4, 4\]"):
        template.overflow(torch.zeros(4, 4).half(), torch.zeros(4).half())


@st.composite
def products(draw):
    """(x, w, bias, residual), of which the residual holds special values."""
    m, n, k = draw(st.integers(1, 150)), draw(st.integers(1, 150)), 23
    special = st.sampled_from([INF, -INF, NAN, MOST, -MOST, 64600.0])
    x, w, residual = torch.randn(m, k), torch.randn(n, k) * 64, torch.randn(m, n)
    places = draw(st.dictionaries(st.integers(0, m * n - 1), special, max_size=3))
    for place, value in places.items():
        residual.view(-1)[place] = value
    bias = torch.randn(n) if draw(st.booleans()) else None
    if bias is not None and draw(st.booleans()):
        bias[-1] = INF
    given = (x, w, bias, residual)
    return tuple(one if one is None else one.to(DEVICE, torch.float16) for one in given)


@given(products())
def test_products_that_clamp(product):
    plain = gemm(*product, params=PARAMS)
    got = gemm(*product, clamp=True, params=PARAMS)
    want = clamp(plain)
    assert not got.isinf().any() and torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))


@pytest.mark.parametrize("place", [(0, 0), (499, 327), (300, 200), None])
def test_one_element_of_a_product_clamps_all(place):
    """In another tile than the largest finite element; sums overflow, not what they are of."""
    x, w = torch.zeros(500, 32, device=DEVICE).half(), torch.zeros(328, 32, device=DEVICE).half()
    x[:, 0], w[:, 0] = 1, 16
    residual = torch.zeros(500, 328, device=DEVICE).half()
    residual[3, 5], residual[4, 5] = 65472, NAN
    if place is not None:
        residual[place] = MOST
    got = gemm(x, w, None, residual, clamp=True, params=PARAMS)
    assert got[3, 5] == (65488 if place is None else MOST - 1000) and got[4, 5].isnan()
    assert got[0, 1] == 16 and got.isnan().sum() == 1
    if place is not None:
        assert got[place] == MOST - 1000


@pytest.mark.parametrize("place", [0, 1023, 1024, 2999, None])
def test_more_flags_than_are_read_at_once(place):
    x = torch.full((3, 5000), MOST, device=DEVICE).half()
    flags = torch.zeros(3000, device=DEVICE, dtype=torch.int32)
    if place is not None:
        flags[place] = 1
    template.clamp(x, flags)
    assert (x == (MOST if place is None else MOST - 1000)).all()


def test_products_of_other_dtypes_are_not_clamped():
    x = torch.zeros(8, 8, device=DEVICE).bfloat16()
    with pytest.raises(UnsupportedError, match="only float16 is clamped"):
        gemm(x, x, clamp=True)


def test_kernels_compile():
    assert not misfits("overflow find") and not misfits("overflow clamp")


@pytest.mark.parametrize("scale", [1.0, 60000.0])
def test_blocks_of_t5_that_overflow(scale):
    model = build("t5").half()
    with torch.no_grad():
        for block in model.encoder.block:
            block.layer[0].SelfAttention.o.weight.mul_(scale)
    inputs = inputs_of(model)
    want = first(model, inputs)
    seen = []
    model.encoder.final_layer_norm.register_forward_pre_hook(lambda _, x: seen.append(x[0].max()))
    first(model, inputs)
    assert (seen[0] > 60000) == (scale > 1)
    assert all(sum(name == "clamp" for name in one.layer.names) == 2 for one in find(model))
    assert len(install(find(model))) == 2
    torch.testing.assert_close(first(model, inputs), want, atol=4e-3, rtol=4e-3)


def ending(layer, length):
    """Blocks whose last product takes `length` operators; everything else one by one."""
    ends = ("gemm", "residual", "clamp")[:length]
    scheme = min(
        (s for s in schemes(layer.names) if all(len(x) == 1 or x == ends for x in s.segments)),
        key=lambda s: len(s.sizes),
    )
    runs = {one: ("gemm", PARAMS) if one == ends else ("torch", {}) for one in scheme.segments}
    assert ends in runs
    return Choice.of(scheme, runs)


def test_blocks_of_t5_whose_products_clamp():
    model = build("t5").half().to(DEVICE)
    with torch.no_grad():
        for block in model.encoder.block:
            block.layer[1].DenseReluDense.wo.weight.mul_(60000.0)
    inputs = {name: x.to(DEVICE) for name, x in inputs_of(model).items()}
    want = None
    # A product that overflows may come back by its residual, which PyTorch's own does not see.
    for length in (2, 3):
        choices = {one.kind: {40: ending(one.layer, length)} for one in find(model)}
        assert len(install(find(model), choices)) == 2
        got = []
        hook = model.encoder.final_layer_norm.register_forward_pre_hook(
            lambda _, x, got=got: got.append(x[0].clone())
        )
        for _ in range(2):
            first(model, inputs)
        hook.remove()
        assert got[0].max() == MOST - 1000 and torch.equal(*got)
        assert want is None or torch.equal(got[0], want)
        want = got[0]


@pytest.mark.parametrize("scale", [1.0, 60000.0])
def test_blocks_of_t5_whose_sums_are_clamped_and_normalised(scale):
    model = build("t5").half().to(DEVICE)
    with torch.no_grad():
        for block in model.encoder.block:
            block.layer[0].SelfAttention.o.weight.mul_(scale)
    inputs = {name: x.to(DEVICE) for name, x in inputs_of(model).items()}
    seen = []
    model.encoder.final_layer_norm.register_forward_pre_hook(lambda _, x: seen.append(x[0].clone()))
    want = first(model, inputs)
    choices = {}
    for one in find(model):
        scheme = next(
            s for s in schemes(one.layer.names)
            if all(len(x) == 1 or x[0] == "residual" for x in s.segments)
        )  # fmt: skip
        assert ("residual", "clamp", "norm") in scheme.segments
        assert scheme.segments[-1] == ("residual", "clamp")
        runs = {("residual", "clamp", "norm"): "clamped_norm", ("residual", "clamp"): "overflow"}
        chosen = {s: (runs[s], None) if s in runs else ("torch", {}) for s in scheme.segments}
        choices[one.kind] = {40: Choice.of(scheme, chosen)}
    assert len(install(find(model), choices)) == 2
    for _ in range(2):
        torch.testing.assert_close(first(model, inputs), want, atol=4e-3, rtol=4e-3)
    assert (seen[0].abs().max() > 60000) == (scale > 1)
    # Weights of 60,000 make much of how heads were rounded.
    got, before = seen[1].double(), seen[0].double()
    assert got.abs().max() == before.abs().max() or scale == 1
    assert (got - before).norm() < 1e-3 * before.norm()
    assert torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("tokens", [1, 20, 200])
@pytest.mark.parametrize("decoder", [False, True])
def test_the_position_bias_is_t5s_own(tokens, decoder):
    config = transformers.T5Config(
        vocab_size=97, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4
    )
    model = transformers.T5Model(config).eval()
    stack = model.decoder if decoder else model.encoder
    found = next(f for f in find(stack))
    own = found.module.layer[0].SelfAttention
    rows = torch.zeros(1, tokens, 64)
    context = type("Context", (), {"cache": None})()
    with torch.no_grad():
        got = found.layer.position_bias(rows, context)
        assert torch.equal(got, own.compute_bias(tokens, tokens))
    assert got.is_contiguous()
