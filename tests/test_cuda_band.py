"""The CUDA kernel for bands of keys against the fp64 oracle, on a Hopper GPU."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from stof_hf import SparseMask, patterns
from stof_hf.attention.model import BandForm
from stof_hf.attention.reference import reference_attention

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_empty")]

TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def on_hopper():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the GPU is no Hopper GPU")


def make(batch, heads, kv_heads, q_len, kv_len, dim, dtype, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    shapes = (batch, q_len, heads, dim), (batch, kv_len, kv_heads, dim)
    return tuple(
        torch.randn(shapes[i], generator=g, device="cuda", dtype=dtype).transpose(1, 2)
        for i in (0, 1, 1)
    )


def compare(q, k, v, mask, form, sinks=None, blocks=None, together=None):
    from stof_hf.attention.cuda_band import BandCall

    # What the kernel allocates comes from this memory: what it does not write shows.
    torch.full((1 << 22,), torch.nan, device="cuda")
    call = BandCall(q, k, v, mask, sinks, 0.2, form=form)
    call.problem.grid = max(blocks or call.problem.grid, form.heads)
    call.problem.together = min(together or call.problem.together, q.shape[0] * q.shape[1])
    out, lse = call(q, k, v, mask, None, sinks)
    want, want_lse = reference_attention(
        q, k, v, mask.to_dense(), scale=0.2, softcap=0.0, bias=None, sinks=sinks
    )
    near = {"atol": TOLERANCE[q.dtype], "rtol": TOLERANCE[q.dtype]}
    torch.testing.assert_close(out.transpose(1, 2).double(), want, **near)
    torch.testing.assert_close(lse.double(), want_lse, atol=2e-3, rtol=1e-3)


FORMS = [(64, BandForm(192)), (64, BandForm(128)), (128, BandForm(128)), (128, BandForm(128, 2))]
reach = st.one_of(st.integers(0, 40), st.integers(0, 900))
bands = st.one_of(
    st.just(patterns.Full()),
    st.just(patterns.Causal()),
    st.builds(patterns.SlidingWindow, reach, reach),
    st.builds(lambda left: patterns.Causal() & patterns.SlidingWindow(left, left), reach),
)


# HYPOTHESIS_PROFILE=thorough runs 10,000 of them.
@given(
    bands, st.integers(1, 900), st.integers(1, 900), st.integers(-500, 500),
    st.sampled_from(FORMS), st.sampled_from(sorted(TOLERANCE, key=str)),
    st.sampled_from([(1, 1, 1), (2, 3, 3), (1, 4, 2), (2, 6, 1)]), st.sampled_from([1, 7, 132]),
    st.sampled_from([1, 2, 5]), st.booleans(),
)  # fmt: skip
def test_random_bands(
    pattern, q_len, kv_len, offset, dim_and_form, dtype, sizes, blocks, together, has_sinks
):
    dim, form = dim_and_form
    assume(sizes[1] // sizes[2] % form.heads == 0)
    mask = SparseMask.from_pattern(
        pattern, q_len, kv_len, q_offset=max(offset, 0), kv_offset=max(-offset, 0), device="cuda"
    )
    q, k, v = make(*sizes, q_len, kv_len, dim, dtype)
    sinks = torch.randn(sizes[1], device="cuda") if has_sinks else None
    compare(q, k, v, mask, form, sinks, blocks, together)


@pytest.mark.parametrize("dim, form", FORMS)
def test_rows_of_a_packed_projection(dim, form):
    packed = torch.randn(2, 500, 8 * dim, device="cuda", dtype=torch.bfloat16)
    q, k, v = packed.unflatten(2, (8, dim)).transpose(1, 2).split((4, 2, 2), dim=1)
    mask = SparseMask.from_pattern(patterns.Causal(), 500, 500, device="cuda")
    compare(q, k, v, mask, form)


@pytest.mark.parametrize("dim, form", FORMS)
def test_many_rounds_of_blocks_and_long_rings(dim, form):
    mask = SparseMask.from_pattern(patterns.SlidingWindow(700, 300), 5000, 5000, device="cuda")
    for kv_heads in (8, 4)[form.heads - 1 :]:
        q, k, v = make(1, 8, kv_heads, 5000, 5000, dim, torch.float16)
        compare(q, k, v, mask, form, blocks=17)


@pytest.mark.parametrize("kv_len", [128, 129, 144, 145, 257, 1025])
@pytest.mark.parametrize("dim, form", FORMS)
def test_few_keys_behind_the_last_whole_step(dim, form, kv_len):
    """They are computed by themselves where everybody sees all keys."""
    for q_len in (1, 200, 1025):
        for pattern in (patterns.Full(), patterns.SlidingWindow(1024, 1024), patterns.Causal()):
            mask = SparseMask.from_pattern(pattern, q_len, kv_len, device="cuda")
            q, k, v = make(2, 4, 2, q_len, kv_len, dim, torch.bfloat16)
            compare(q * 4, k, v, mask, form, torch.randn(4, device="cuda"), blocks=7)
