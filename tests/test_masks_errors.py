"""Bad masks and patterns: an error that says what was given and what to change."""

import copy
import pickle

import numpy as np
import pytest
import torch

from stof_hf import MaskError, StofError
from stof_hf.masks import Pattern, SparseMask
from stof_hf.masks import patterns as p

EYE = torch.eye(8, dtype=torch.bool)
CAUSAL = SparseMask.from_pattern(p.Causal(), 100)
PER_BATCH = SparseMask.from_dense(torch.ones(2, 1, 8, 8, dtype=torch.bool))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: p.SlidingWindow(-1, 0), "left must be a whole number of at least 0, not -1"),
        (lambda: p.SlidingWindow(0, 1.5), "right must be a whole number of at least 0, not 1.5"),
        (lambda: p.SlidingWindow(True, 0), "left must be a whole number"),
        (lambda: p.Dilated(-1, 1), "window must be a whole number of at least 0"),
        (lambda: p.Dilated(1, 0), "dilation must be a whole number of at least 1, not 0"),
        (lambda: p.Chunked(0), "size must be a whole number of at least 1"),
        (lambda: p.PrefixLM(-2), "prefix must be a whole number of at least 0"),
        (lambda: p.Longformer(-4), "window must be a whole number of at least 0, not -4"),
        (lambda: p.Longformer(4, (0, -1)), "global_tokens must be positions of at least 0"),
        (lambda: p.Longformer(4, (0, 1.5)), "global_tokens must be positions of at least 0"),
        (lambda: p.Longformer(4, 0), r"such as \(0, 1\), not 0"),
        (lambda: p.GlobalTokens(("a",)), "tokens must be positions"),
        (lambda: p.BlockTable(np.zeros((2, 2), bool), 4), "a table of blocks must hold booleans"),
        (lambda: p.BlockTable(np.zeros((1, 2, 2), bool), 0), "block_size must be a whole number"),
        (lambda: p.BigBird(-1), "window must be a whole number"),
        (lambda: p.BigBird(1, (0,), -3), "blocks must be a whole number of at least 0, not -3"),
        (lambda: p.BigBird(1, block_size=0), "block_size must be a whole number of at least 1"),
        (lambda: p.RandomBlocks(1, fill=0.0), r"fill must lie in \(0, 1\], not 0.0"),
        (lambda: p.RandomBlocks(1, fill="all"), r"fill must lie in \(0, 1\], not 'all'"),
        (lambda: p.RandomBlocks(1, seed=-1), "seed must be a whole number of at least 0"),
        (lambda: p.Documents(torch.zeros(2, 3, 4)), r"numbers, \[S\] or \[B, S\]"),
        (lambda: p.Documents([]), "not empty"),
        (lambda: p.Documents([0.5, 1.0]), "must be whole numbers"),
        (lambda: p.Custom("causal"), r"needs a mask function f\(b, h, q, k\), not 'causal'"),
        (lambda: p.Custom(lambda b, h, q, k: k <= q, heads=0), "heads must be a whole number"),
        (lambda: p.Dense([[True]]), "must be a tensor, not list"),
        (lambda: p.Dense(torch.zeros(4, 4)), "give mask == 0"),
        (lambda: p.Dense(EYE[None]), r"\[Sq, Sk\] or \[B, H, Sq, Sk\] .* not \[1, 8, 8\]"),
        (lambda: p.Dense(EYE[:0]), "not empty"),
        (lambda: p.And(()), "at least one pattern"),
        (lambda: p.Or((p.Causal(), "window")), "only patterns combine"),
        (lambda: p.Not(EYE), "only patterns combine"),
        (
            lambda: p.Documents([[0], [1]]) & p.Documents([[0], [1], [2]]),
            r"different batch sizes, \[2, 3\]",
        ),
        (lambda: Pattern.from_json({"type": "Spiral"}), "'Spiral' is no pattern"),
        (lambda: Pattern.from_json({"type": "_Composed"}), "'_Composed' is no pattern"),
        (lambda: Pattern.from_json({"type": "Custom"}), "'Custom' is no pattern"),
        (lambda: Pattern.from_json({"type": "Causal", "x": 1}), "cannot read pattern Causal"),
        (lambda: Pattern.from_json("Causal"), r"made by Pattern.to_json\(\)"),
        (lambda: p.Custom(lambda b, h, q, k: k <= q).to_json(), "persist=False"),
        (lambda: (p.Causal() & p.Dense(EYE)).to_json(), "persist=False"),
    ],
)
def test_patterns(make, message):
    with pytest.raises(MaskError, match=message):
        make()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SparseMask.from_pattern("causal", 8), "expected a Pattern such as"),
        (lambda: SparseMask.from_pattern(p.Causal(), 0), "queries must be .* at least 1, not 0"),
        (lambda: SparseMask.from_pattern(p.Causal(), 8, 0), "keys must be .* at least 1, not 0"),
        (lambda: SparseMask.from_pattern(p.Causal(), 8.0), "whole number"),
        (lambda: SparseMask.from_pattern(p.Causal(), 8, q_offset=-1), "q_offset must be"),
        (lambda: SparseMask.from_pattern(p.Causal(), 8, kv_offset=-1), "kv_offset must be"),
        (
            lambda: SparseMask.from_pattern(p.BigBird(8, random_blocks=5), 256),
            "5 random blocks .* 256 keys make only 4 blocks of 64: ask for fewer or smaller blocks",
        ),
        (
            lambda: SparseMask.from_function(lambda b, h, q, k: 0.5 * (q - k), 8),
            "must return a bool tensor, this one returned torch.float32",
        ),
        (lambda: SparseMask.from_function(lambda b, h, q, k: True, 8), "returned bool"),
        (
            lambda: SparseMask.from_function(lambda b, h, q, k: torch.ones(3, dtype=torch.bool), 8),
            r"what its arguments b, h, q, k broadcast to, here \[64, 1, 64\], not \[3\]",
        ),
        (lambda: SparseMask.from_dense(torch.zeros(1, 1, 8, 8)), "give mask == 0"),
        (lambda: SparseMask.from_dense(EYE[None, None, :, :0]), "not empty"),
        (lambda: SparseMask.from_coo(EYE), "use dense.to_sparse"),
        (lambda: SparseMask.from_coo(EYE.float().to_sparse()), "torch.float32"),
        (lambda: SparseMask.from_block_mask(EYE), "expected a BlockMask"),
        (lambda: CAUSAL.with_padding(torch.ones(2, 99, dtype=torch.bool)), r"\[batch, 100\]"),
        (lambda: CAUSAL.with_padding(torch.ones(100, dtype=torch.bool)), r"not \[100\]"),
        (lambda: CAUSAL.with_padding(torch.zeros(2, 100)), "give padding == 0"),
        (lambda: PER_BATCH.with_padding(torch.ones(3, 8, dtype=torch.bool)), "a batch of 3"),
        (lambda: CAUSAL.rows(99, 2, 100), "queries 99 to 101 do not lie in a mask of 100"),
        (lambda: CAUSAL.rows(-1, 1, 100), "queries -1 to 0"),
        (lambda: CAUSAL.rows(0, 1, 90, col_start=11), "keys 11 to 101"),
        (lambda: CAUSAL.rows(torch.tensor([3]), 101, 100), "do not lie"),
        (lambda: CAUSAL.rows(5, 1, 10).rows(1, 1, 5), "rows.. of a view"),
        (lambda: CAUSAL.rows(5, 1, 10).to_block_mask(), "a decode view has no BlockMask"),
        (lambda: CAUSAL.to_block_mask(48), "multiple of 64, not 48"),
    ],
)
def test_masks(make, message):
    with pytest.raises(MaskError, match=message):
        make()


def test_class_of_the_errors():
    assert issubclass(MaskError, StofError) and issubclass(MaskError, ValueError)
    with pytest.raises(TypeError):
        p.Causal() & 3


def test_a_pattern_class_cannot_take_anothers_name():
    with pytest.raises(MaskError, match="a pattern named Causal exists already"):
        type("Causal", (Pattern,), {"__module__": "elsewhere"})
    assert Pattern.from_json({"type": "Causal"}) == p.Causal()


def test_numbers_of_other_libraries_are_positions():
    tokens = (np.int64(3), torch.tensor(1), 1)
    assert p.GlobalTokens(tokens).tokens == (1, 3)
    assert p.Longformer(2, tokens) == p.Longformer(2, (3, 1, 1))


DISTINCT = [
    p.Full(), p.Causal(), ~p.Causal(), p.SlidingWindow(1, 2), p.SlidingWindow(2, 1),
    p.Dilated(1, 2), p.Dilated(2, 1), p.Chunked(4), p.Chunked(5), p.PrefixLM(3),
    p.GlobalTokens((0,)),
    p.GlobalTokens(()), p.Longformer(4, (0,)), p.Longformer(4, (1,)), p.Longformer(4, ()),
    p.BigBird(4), p.BigBird(4, seed=1), p.BigBird(4, random_blocks=2), p.RandomBlocks(2),
    p.RandomBlocks(2, causal=True), p.RandomBlocks(2, fill=0.5), p.RandomBlocks(2, kv_len=256),
    p.Documents([0, 0, 1]), p.Documents([[0, 0, 1], [0, 1, 1]]), p.Documents([0, 1, 1]),
    p.Causal() & p.Chunked(4), p.Causal() | p.Chunked(4), ~(p.Causal() & p.Chunked(4)),
    p.Causal() & ~p.Chunked(4), p.Custom(lambda b, h, q, k: k <= q), p.Custom(max, key="a"),
    p.Custom(max, key="b"), p.Custom(max, key="a", heads=2), p.Dense(EYE), p.Dense(EYE.clone()),
]  # fmt: skip


def test_different_patterns_have_different_fingerprints():
    assert len({pattern.fingerprint for pattern in DISTINCT}) == len(DISTINCT)
    assert len(set(DISTINCT)) == len(DISTINCT)


def test_equal_patterns_have_equal_fingerprints():
    a, b, c = p.Causal(), p.Chunked(4), p.GlobalTokens((2, 0))
    assert p.SlidingWindow(1, 2) == p.SlidingWindow(left=1, right=2)
    assert c == p.GlobalTokens([0, 2, 2])
    assert (a & b) & c == a & (c & b) == c & a & b
    assert (a | b) | c == c | (a | b)
    assert a & a & b == a & b
    assert p.Custom(max, key="a") == p.Custom(min, key="a")
    dense = EYE.clone()
    before = p.Dense(dense)
    assert before == p.Dense(dense)
    dense[0, 1] = True
    assert before != p.Dense(dense)
    assert copy.deepcopy(before) != before
    assert pickle.loads(pickle.dumps(a & c)) == copy.deepcopy(a & c) == a & c
    with torch.inference_mode():
        dense = EYE.clone()
        before = p.Dense(dense)
        dense[0, 1] = True
        assert before == before and before != p.Dense(dense)
