"""Masks that the host library builds, against those that numpy builds."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases
from test_masks_property import canonical, check_invariants

from stof_hf.errors import BuildError, StofWarning
from stof_hf.kernels import jit
from stof_hf.masks import SparseMask, closed_form, native
from stof_hf.masks import patterns as p

pytestmark = pytest.mark.skipif(jit.find_compiler() is None, reason="no C++ compiler")

FAR = 10**15
IDS = torch.randint(-1, 4, (2, 700), generator=torch.Generator().manual_seed(0))


def by_numpy(pattern, *args, **kwargs):
    with patch.object(closed_form, "program", lambda pattern: None):
        return SparseMask.from_pattern(pattern, *args, **kwargs)


def compare(pattern, *args, **kwargs):
    mask, want = (build(pattern, *args, **kwargs) for build in (SparseMask.from_pattern, by_numpy))
    assert canonical(mask) == canonical(want)
    assert mask.valid_share == pytest.approx(want.valid_share, abs=1e-12)
    check_invariants(mask)
    for one in (mask, want):
        tensors = (one.row_ptr, one.run_col, one.run_len, one.run_bits, one.tile_bits)
        assert {"host_runs", "host_words"} <= set(one.plans)
        for x, y in zip(one.host_arrays(), tensors, strict=True):
            assert x.shape == tuple(y.shape) and (x.view(y.numpy().dtype) == y.numpy()).all()


@given(cases())
def test_random_patterns(case):
    compare(case.pattern, case.q_len, case.kv_len, **case.where, padding=case.padding)


@given(
    st.integers(1, 4), st.sampled_from([16, 32, 48, 64, 96, 128, 300]), st.integers(0, 9),
    st.sampled_from([1.0, 0.3]), st.booleans(), st.sampled_from([0, 32, 50, 64]),
)  # fmt: skip
def test_random_blocks(blocks, size, seed, fill, causal, offset):
    pattern = p.RandomBlocks(blocks, size, seed, fill, causal)
    compare(pattern, 1500, q_offset=offset, kv_offset=offset)
    compare(~pattern & p.Causal(), 700, 1400, q_offset=offset)


@pytest.mark.parametrize(
    "pattern",
    [
        p.SlidingWindow(FAR, 70),
        p.SlidingWindow(0, 0),
        p.Dilated(FAR, 5) | p.Dilated(3, FAR),
        p.Dilated(60, 1),
        p.Dilated(3, 200),
        p.Chunked(FAR) & p.Chunked(1),
        p.PrefixLM(FAR),
        p.PrefixLM(0),
        p.GlobalTokens(range(0, 700, 3)),
        p.GlobalTokens((FAR, 5)),
        p.GlobalTokens(()),
        p.GlobalKeys(range(0, 700, 3)) & ~p.GlobalTokens((5, FAR)),
        p.GlobalKeys(()),
        p.RandomBlocks(1, 10**14),
        p.Documents(IDS) & p.Causal(),
        p.Documents(IDS.T.contiguous().T),
        p.Documents(torch.arange(900) // 130) | p.Documents(IDS),
        p.Documents(torch.arange(100) // 7),
        p.Documents(torch.arange(900) // 90 % 3),
        p.Documents(torch.arange(900) // 33 % 3 - 1) & ~p.Causal(),
        p.Documents(torch.full((5,), -1)),
        p.Documents(torch.stack([torch.arange(700) % n for n in (300, 2)])),
        ~(~p.Causal() | p.GlobalTokens((1, 300)) & ~p.Chunked(100)),
    ],
    ids=str,
)
def test_unusual_patterns(pattern):
    for args in ((700,), (65, 701), (129, 640)):
        compare(pattern, *args)
    compare(pattern, 200, 300, q_offset=333, kv_offset=170)


def test_equal_masks_of_a_batch_are_stored_once():
    ids = torch.stack([torch.arange(500) // 100, torch.arange(500) // 90, torch.arange(500) // 100])
    pattern = p.Documents(ids) & p.Causal()
    compare(pattern, 500)
    mask = SparseMask.from_pattern(pattern, 500)
    assert mask.pattern_id.flatten().tolist() == [0, 1, 0]


def test_what_has_no_closed_form_is_left_to_numpy():
    class Tilted(p.Causal):
        def __call__(self, b, h, q, k):
            return k <= q + 5

    assert closed_form.program(Tilted()) is None
    custom = p.Custom(lambda b, h, q, k: k <= q)
    for pattern in (custom, ~custom, custom | p.Causal(), p.RandomBlocks(1, seed=2**63)):
        assert closed_form.program(pattern) is None
    mask = SparseMask.from_pattern(custom & ~Tilted(), 100)
    assert not mask.to_dense().any()


def test_without_the_library_numpy_builds_all(monkeypatch):
    def none():
        raise BuildError("no C++ compiler found")

    want = SparseMask.from_pattern(p.Causal(), 300)
    monkeypatch.setattr(native, "library", none)
    closed_form._library.cache_clear()
    try:
        with pytest.warns(StofWarning, match="built by numpy, .*no C.. compiler found"):
            mask = SparseMask.from_pattern(p.Causal(), 300)
        assert canonical(mask) == canonical(want)
    finally:
        closed_form._library.cache_clear()
