"""Each pattern against its definition, written out query by query and key by key."""

import gc
import weakref

import numpy as np
import pytest
import torch

from stof_hf.masks import SparseMask, bits, patterns

N = 150
IDS = [i // 40 if i % 7 else 2 for i in range(N)]


def in_window(q, k):
    return -9 <= k - q <= 9


@pytest.mark.parametrize(
    "pattern, allowed",
    [
        (patterns.Full(), lambda q, k: True),
        (patterns.Causal(), lambda q, k: k <= q),
        (patterns.SlidingWindow(5, 70), lambda q, k: -5 <= k - q <= 70),
        (patterns.Dilated(4, 3), lambda q, k: k - q in (-12, -9, -6, -3, 0, 3, 6, 9, 12)),
        (patterns.Chunked(60), lambda q, k: q // 60 == k // 60),
        (patterns.PrefixLM(70), lambda q, k: k <= q or k < 70),
        (patterns.GlobalTokens((3, 100)), lambda q, k: q in (3, 100) or k in (3, 100)),
        (patterns.GlobalKeys((3, 100)), lambda q, k: k in (3, 100)),
        (
            patterns.BlockTable(np.eye(4, k=1, dtype=bool)[None], 30),
            lambda q, k: k // 30 == q // 30 + 1 < 4,
        ),
        (patterns.Longformer(9, (0,)), lambda q, k: in_window(q, k) or q == 0 or k == 0),
        (patterns.Documents(IDS), lambda q, k: IDS[q] == IDS[k]),
        (patterns.Documents([0, -1, 0]), lambda q, k: q in (0, 2) and k in (0, 2)),
        (patterns.Custom(lambda b, h, q, k: (q + k) % 3 == 0), lambda q, k: (q + k) % 3 == 0),
        (~patterns.Causal(), lambda q, k: k > q),
        (patterns.Causal() & ~patterns.Chunked(9), lambda q, k: k <= q and q // 9 != k // 9),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, patterns.Pattern) else "",
)
def test_definition(pattern, allowed):
    want = torch.tensor([[bool(allowed(q, k)) for k in range(N)] for q in range(N)])
    assert torch.equal(SparseMask.from_pattern(pattern, N).to_dense()[0, 0], want)


@pytest.mark.parametrize("causal", [False, True])
def test_random_blocks_are_drawn_without_repetition(causal):
    n, size, drawn = 1000, 32, 5
    mask = SparseMask.from_pattern(patterns.RandomBlocks(drawn, size, seed=3, causal=causal), n)
    dense = torch.nn.functional.pad(mask.to_dense()[0, 0], (0, -n % size, 0, -n % size))
    blocks = dense.view(-(-n // size), size, -1, size).any(3).any(1)
    rows = torch.arange(len(blocks))
    expected = (rows + 1).clamp(max=drawn) if causal else torch.full_like(rows, drawn)
    assert torch.equal(blocks.sum(1), expected)
    if causal:
        assert not blocks.triu(1).any()
        longer = SparseMask.from_pattern(patterns.RandomBlocks(drawn, size, 3, causal=True), 2 * n)
        assert torch.equal(longer.to_dense()[..., :n, :n], mask.to_dense())
    assert len({tuple(row) for row in blocks[10:].tolist()}) > 10, "rows draw the same blocks"


def test_share_of_random_elements():
    pattern = patterns.RandomBlocks(4, 64, fill=0.3)
    whole = SparseMask.from_pattern(patterns.RandomBlocks(4, 64), 1024)
    part = SparseMask.from_pattern(pattern, 1024)
    assert 0.28 < part.kept / whole.kept < 0.32
    assert not (part.to_dense() & ~whole.to_dense()).any()


def test_documents_from_position_ids():
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    want = patterns.Documents([[0, 0, 0, 1, 1, 2], [0] * 6])
    assert patterns.Documents.from_position_ids(position_ids) == want


def test_documents_do_not_follow_their_tensor():
    ids = torch.tensor([0, 0, 1])
    pattern = patterns.Documents(ids)
    before = SparseMask.from_pattern(pattern, 3).to_dense()
    ids.zero_()
    assert torch.equal(SparseMask.from_pattern(pattern, 3).to_dense(), before)


def test_masks_do_not_keep_alive_what_they_were_made_of():
    dense = torch.ones(70, 70, dtype=torch.bool).tril()
    block_mask = SparseMask.from_dense(dense).to_block_mask()
    masks = [SparseMask.from_dense(dense), SparseMask.from_block_mask(block_mask)]
    sources = [weakref.ref(dense), weakref.ref(block_mask)]
    del dense, block_mask
    gc.collect()
    assert [source() for source in sources] == [None, None]
    assert masks[0].kept == masks[1].kept


@pytest.mark.parametrize("n", [1, 63, 64, 65, 200])
def test_pack_and_unpack(n):
    x = torch.rand(3, n) < 0.5
    words = bits.pack(x)
    assert words.shape == (3, bits.words_per(n)) and torch.equal(bits.unpack(words, n), x)
    want = [sum(bit << i for i, bit in enumerate(row[:64])) for row in x.tolist()]
    assert [w % (1 << 64) for w in words[:, 0].tolist()] == want


def test_structure_of_common_patterns_is_compact():
    causal = SparseMask.from_pattern(patterns.Causal(), 4096)
    assert len(causal.run_col) == 127 and len(causal.tile_bits) == 1
    window = SparseMask.from_pattern(patterns.SlidingWindow(128, 128), 4096)
    assert len(window.tile_bits) <= 3 and len(window.run_col) <= 3 * 64
    per_head = SparseMask.from_dense(torch.ones(3, 4, 70, 70, dtype=torch.bool).tril())
    assert per_head.row_ptr.shape[0] == 1 and per_head.pattern_id.shape == (3, 4)
