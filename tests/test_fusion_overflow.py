"""The clamp behind T5's parts against PyTorch's operators."""

import pytest
import torch
import transformers
from compiling import misfits
from hypothesis import given
from hypothesis import strategies as st
from layers import build, first, inputs_of

from stof_hf.errors import UnsupportedError
from stof_hf.fusion.install import find, install
from stof_hf.fusion.layer import clamp

template = pytest.importorskip(
    "stof_hf.fusion.templates.overflow", reason="Triton is not installed"
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
