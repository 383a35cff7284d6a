"""Masks against the dense truth: the pattern evaluated on all of the index grid."""

import json

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases, evaluate
from torch.nn.attention.flex_attention import create_block_mask

from stof_hf.masks import Pattern, SparseMask, bits, patterns
from stof_hf.masks.cache import mask_for


def canonical(mask):
    """What masks with equal elements agree in: all but the order of tile_bits."""
    words = [tuple(w) for w in mask.tile_bits.tolist()]
    content = ["full" if i < 0 else words[i] for i in mask.run_bits.tolist()]
    arrays = (mask.pattern_id, mask.row_ptr, mask.run_col, mask.run_len)
    return [x.tolist() for x in arrays], content, sorted(words)


def check_invariants(mask):
    q_len, kv_len = mask.q_len, mask.kv_len
    tile_rows, tile_cols = bits.words_per(q_len), bits.words_per(kv_len)
    patterns_, ptr = mask.row_ptr.shape[0], mask.row_ptr.tolist()
    for x in (mask.pattern_id, mask.row_ptr, mask.run_col, mask.run_len, mask.run_bits):
        assert x.dtype == torch.int32 and x.is_contiguous()
    assert mask.tile_bits.dtype == torch.int64 and mask.tile_bits.is_contiguous()
    assert mask.row_ptr.shape == (patterns_, tile_rows + 1)
    assert sorted(set(mask.pattern_id.flatten().tolist())) == list(range(patterns_))
    assert ptr[0][0] == 0 and ptr[-1][-1] == len(mask.run_col) == len(mask.run_len)
    assert all(a[-1] == b[0] for a, b in zip(ptr, ptr[1:], strict=False))

    columns = (mask.run_col, mask.run_len, mask.run_bits)
    runs = list(zip(*(x.tolist() for x in columns), strict=True))
    column = torch.arange(tile_cols * 64).view(tile_cols, 64) < kv_len
    used = torch.arange(tile_rows * 64).view(tile_rows, 64) < q_len
    for p in range(patterns_):
        for row in range(tile_rows):
            end, was_full = 0, False
            for col, length, content in runs[ptr[p][row] : ptr[p][row + 1]]:
                assert col >= end and length >= 1 and col + length <= tile_cols
                if content < 0:
                    assert content == -1 and (col + length) * 64 <= kv_len
                    assert not (was_full and col == end), "two full runs that touch"
                else:
                    assert length == 1
                    tile = bits.unpack(mask.tile_bits[content][:, None], 64)
                    inside = used[row][:, None] & column[col]
                    assert tile.any(), "an empty tile is stored"
                    assert not (tile & ~inside).any(), "a bit out of range is set"
                    assert not (column[col].all() and tile[used[row]].all()), "full, stored as bits"
                end, was_full = col + length, content < 0
    assert len(set(map(tuple, mask.tile_bits.tolist()))) == len(mask.tile_bits)
    assert set(mask.run_bits[mask.run_bits >= 0].tolist()) == set(range(len(mask.tile_bits)))
    if mask.kv_valid is not None:
        assert mask.kv_valid.shape[1] == tile_cols
        assert not bits.unpack(mask.kv_valid, tile_cols * 64)[:, kv_len:].any()


@given(cases())
def test_from_pattern(case):
    mask = case.mask()
    assert torch.equal(mask.to_dense(), case.truth())
    assert mask.shape == case.truth().shape
    check_invariants(mask)


@given(cases())
def test_every_builder_gives_the_same_arrays(case):
    truth, pattern = case.truth(padding=False), case.bound()
    expected = canonical(case.mask(padding=False))
    function = SparseMask.from_function(
        pattern.__call__,
        case.q_len,
        case.kv_len,
        batch=pattern.batch,
        heads=pattern.heads,
        **case.where,
    )
    assert canonical(function) == expected
    assert canonical(SparseMask.from_dense(truth)) == expected
    assert canonical(SparseMask.from_coo(truth.to_sparse())) == expected
    if truth.shape[:2] == (1, 1):
        assert canonical(SparseMask.from_dense(truth[0, 0])) == expected
        assert canonical(SparseMask.from_coo(truth[0, 0].to_sparse())) == expected


@given(cases(offsets=False), st.sampled_from([64, 128, (128, 64), 48]))
def test_from_block_mask(case, block_size):
    truth = case.truth(padding=False)

    def mask_mod(b, h, q, k):
        return truth[b, h, q, k]

    batch, heads = truth.shape[:2]
    block_mask = create_block_mask(
        mask_mod, batch, heads, case.q_len, case.kv_len, device="cpu", BLOCK_SIZE=block_size
    )
    mask = SparseMask.from_block_mask(block_mask)
    assert canonical(mask) == canonical(case.mask(padding=False))


@given(cases(), st.sampled_from([64, 128]))
def test_to_block_mask(case, block_size):
    mask, truth = case.mask(), case.truth()
    block_mask = mask.to_block_mask(block_size)
    b, h, q, k = (torch.arange(n) for n in truth.shape)
    index = b[:, None, None, None], h[:, None, None], q[:, None], k
    held = torch.zeros(truth.shape, dtype=torch.bool)
    lists = block_mask.kv_num_blocks, block_mask.kv_indices
    for i, j, row in torch.cartesian_prod(*(torch.arange(n) for n in lists[0].shape)).tolist():
        here = slice(row * block_size, (row + 1) * block_size)
        for col in lists[1][min(i, len(lists[1]) - 1), j, row, : lists[0][i, j, row]].tolist():
            held[i, j, here, col * block_size : (col + 1) * block_size] = True
    assert torch.equal(block_mask.mask_mod(*index) & held, truth)
    again = SparseMask.from_block_mask(block_mask)
    assert torch.equal(again.to_dense(), truth)


@given(cases())
def test_round_trips(case):
    mask, truth = case.mask(), case.truth()
    assert torch.equal(SparseMask.from_dense(mask.to_dense()).to_dense(), truth)
    coo = mask.to_coo()
    assert coo.dtype == torch.bool and torch.equal(coo.to_dense(), truth)
    assert torch.equal(SparseMask.from_coo(coo).to_dense(), truth)
    assert mask.to("cpu") is mask and mask.to(torch.float16) is mask and mask.contiguous() is mask


@given(cases())
def test_counts(case):
    mask, truth = case.mask(), case.truth()
    assert mask.kept == truth.sum()
    assert abs(mask.density - truth.double().mean()) < 1e-12
    truth = case.truth(padding=False).double()
    blocks = torch.nn.functional.max_pool2d(truth, 16, ceil_mode=True)
    assert abs(mask.valid_share - blocks.mean()) < 1e-9


@given(cases())
def test_inner_tiles(case):
    mask = case.mask()
    inner = mask.inner_tiles()
    assert inner.shape == (len(mask.tile_bits), 8, 8)
    tiles = bits.unpack(mask.tile_bits[..., None], 64)
    for u in range(min(3, len(inner))):
        for i in range(8):
            for j in range(8):
                block = tiles[u, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].flatten().tolist()
                word = inner[u, i, j].item() % (1 << 64)
                assert word == sum(bit << n for n, bit in enumerate(block))


@given(cases(), st.data(), st.booleans())
def test_decode_views(case, data, on_device):
    mask = case.mask(padding=False)
    q_len, kv_len = data.draw(st.integers(1, mask.q_len)), data.draw(st.integers(1, mask.kv_len))
    row = data.draw(st.integers(0, mask.q_len - q_len))
    col = data.draw(st.integers(0, mask.kv_len - kv_len))
    starts = (torch.tensor([row]), torch.tensor([col])) if on_device else (row, col)
    view = mask.rows(starts[0], q_len, kv_len, starts[1])
    want = case.truth(padding=False)[:, :, row : row + q_len, col : col + kv_len]
    assert view.shape == want.shape and torch.equal(view.to_dense(), want)
    assert view.kept == want.sum() and view.plans is mask.plans
    valid = torch.rand(len(want), kv_len) < 0.7
    assert torch.equal(view.with_padding(valid).to_dense(), want & valid[:, None, None])


@given(cases(), st.booleans(), st.booleans())
def test_mask_for(case, tensor_offset, on_device):
    offset = torch.tensor(case.q_offset) if tensor_offset else case.q_offset
    known = case.kv_offset + case.kv_len >= case.q_offset + case.q_len
    if tensor_offset and not known:
        return
    mask = mask_for(
        case.pattern, case.q_len, case.kv_len, offset, case.kv_offset,
        device=torch.device("cpu"), on_device=on_device,
    )  # fmt: skip
    assert torch.equal(mask.to_dense(), case.truth(padding=False))


@given(cases())
def test_json_and_fingerprint(case):
    pattern = case.pattern
    assert pattern == pattern and hash(pattern) == hash(pattern)
    assert ~pattern != pattern
    if not pattern.serializable:
        return
    read = Pattern.from_json(json.loads(json.dumps(pattern.to_json())))
    assert read == pattern and read.fingerprint == pattern.fingerprint
    for name in ("batch", "heads", "length_free"):
        assert getattr(read, name) == getattr(pattern, name)
    dense = evaluate(read.bind(case.kv_offset + case.kv_len), case.q_len, case.kv_len, **case.where)
    assert torch.equal(dense, case.truth(padding=False))


@given(cases(), st.data())
def test_algebra(case, data):
    end = max(case.q_offset + case.q_len, case.kv_offset + case.kv_len)
    others = [patterns.Causal(), patterns.Chunked(50), patterns.GlobalTokens((end // 2,))]
    other = data.draw(st.sampled_from(others))
    a, b = case.bound(), other
    assert a & b == b & a and a | b == b | a
    assert (a & b).fingerprint != (a | b).fingerprint or a == b

    def dense(pattern):
        return SparseMask.from_pattern(pattern, case.q_len, case.kv_len, **case.where).to_dense()

    assert torch.equal(dense(a & b), dense(a) & dense(b))
    assert torch.equal(dense(a | b), dense(a) | dense(b))
    assert torch.equal(dense(~a), ~dense(a))
