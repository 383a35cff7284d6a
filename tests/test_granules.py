"""The work list of the CUDA kernels against its mask, by following it step by step."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measure import measure
from strategies import cases

from stof_hf import SparseMask, patterns
from stof_hf.attention.granules import NONE, GranulePlan, Layout, granule_plan, work_of
from stof_hf.kernels import jit
from stof_hf.masks.sparse_mask import EMPTY, FULL

pytestmark = pytest.mark.skipif(jit.find_compiler() is None, reason="no C++ compiler")

LAYOUTS = {"rows": Layout(2, False), "heads": Layout(1, False), "paired": Layout(1, True)}


def words_of(fragments: np.ndarray) -> np.ndarray:
    """bool [64, 64] of one content in fragment order."""
    out = np.zeros((64, 64), bool)
    thread = np.arange(128)
    for j in range(8):
        for r in range(2):
            for c in range(2):
                bit = fragments.view(np.uint32) >> (4 * j + 2 * r + c) & 1
                row = thread // 32 * 16 + thread % 32 // 4 + 8 * r
                out[row, 8 * j + 2 * (thread % 4) + c] = bit
    return out


def follow(plan: GranulePlan, layout: Layout, p: int, q_len: int, kv_len: int) -> np.ndarray:
    """How often pattern p's items compute each pair, [Sq, Sk]; checks what is stored where."""
    items, steps, merges = (x.numpy() for x in (plan.items, plan.steps, plan.merges))
    rows, bits = plan.rows.numpy(), plan.bits.numpy()
    pairs = np.zeros((q_len, -(-kv_len // 64) * 64 + 64), int)
    stored, slots = np.zeros(q_len, int), {}

    def rows_of(tile):
        at = tile * 64 + np.arange(64) if tile >= 0 else rows[-1 - tile]
        return np.where(at < q_len, at, -1)

    for tile0, tile1, first_key, n_run, first, n_list, slot, _ in items[p]:
        if tile0 == NONE:
            continue
        heads = layout.tiles == 1 and not layout.paired
        paired = not heads and tile0 == tile1
        halves = [tile0] if heads or paired else [tile0, tile1]
        for half, tile in enumerate(halves):
            if tile == NONE:
                continue
            at = rows_of(tile)
            lanes = np.flatnonzero(at >= 0)
            for i in range(n_run):
                keys = first_key + 64 * i + np.arange(64)
                pairs[np.ix_(at[lanes], keys)] += 1
            for step in steps[first : first + n_list]:
                keys = (step[:4, None] + np.arange(16)).reshape(-1)
                if paired or heads:
                    assert step[4] == step[5]
                content = step[4 + half]
                if content == EMPTY:
                    continue
                seen = np.ones((64, 64), bool) if content == FULL else words_of(bits[content])
                np.add.at(pairs, (at[lanes][:, None], keys[None]), seen[lanes])
            if slot < 0:
                stored[at[lanes]] += 1
            else:
                slots[slot + half] = tile
    for tile, slot, count, apart in merges[p]:
        if tile == NONE:
            continue
        for i in range(count):
            assert slots.pop(slot + i * apart) == tile
        at = rows_of(tile)
        stored[at[at >= 0]] += 1
    assert not slots and (stored == 1).all()
    assert plan.slots >= 0 and not pairs[:, kv_len:].any()
    return pairs[:, :kv_len]


def check(mask: SparseMask, layout: Layout, copies: int, workers: int) -> GranulePlan:
    plan = granule_plan(mask, layout, copies, workers, 3)
    queue, total = plan.queue[plan.queue >= 0], copies * plan.items.shape[1]
    assert sorted(queue.tolist()) == list(range(total if total > workers else 0))
    assert len(plan.queue) % workers == 0
    dense = mask.to_dense().numpy()
    for b in range(mask.pattern_id.shape[0]):
        for h in range(mask.pattern_id.shape[1]):
            p = int(mask.pattern_id[b, h])
            got = follow(plan, layout, p, mask.q_len, mask.kv_len)
            assert (got == dense[b, h]).all()
    return plan


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from(sorted(LAYOUTS)), st.sampled_from([1, 8, 300]))
def test_every_allowed_pair_is_computed_once(case, layout, workers):
    check(case.mask(padding=False), LAYOUTS[layout], 8, workers)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("length", [512, 1000])
def test_rows_of_global_tokens_share_a_tile(layout, length):
    tokens = (*range(3), 500, 501)
    mask = SparseMask.from_pattern(patterns.Longformer(40, tokens), length)
    plan = check(mask, LAYOUTS[layout], 4, 16)
    gathered = plan.rows.numpy()
    assert any(set(tokens) == set(row[row >= 0]) for row in gathered)


def test_a_stripe_of_keys_costs_its_granules():
    mask = SparseMask.from_pattern(patterns.Longformer(16, tuple(range(16))), 4096)
    plan = granule_plan(mask, LAYOUTS["heads"], 1, 10**6, 1)
    items = plan.items.numpy()[0]
    ordinary = items[(items[:, 0] > 3) & (items[:, 0] < 60)]
    # 16 global keys and 64 + 2 * 16 of the band: 112 keys, two steps.
    assert (ordinary[:, 5] == 2).all()
    assert torch.unique(plan.steps[:, :4] % 16).tolist() == [0]


def test_rows_of_a_short_tile_are_not_gathered():
    mask = SparseMask.from_pattern(patterns.Longformer(60, (0, 500)), 1000)
    gathered = check(mask, LAYOUTS["heads"], 4, 16).rows.numpy()
    assert 500 in gathered and 999 not in gathered


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("workers", [1, 300])
def test_two_long_runs_are_computed_apart(layout, workers):
    mask = SparseMask.from_pattern(~patterns.SlidingWindow(200, 100), 130, 80000, q_offset=37000)
    plan = check(mask, LAYOUTS[layout], 8, workers)
    assert len(plan.steps) < 20 and plan.merges.shape[1] == 3


def test_equal_rows_share_their_steps():
    mask = SparseMask.from_pattern(~patterns.Chunked(640), 6400)
    plan = check(mask, LAYOUTS["heads"], 1, 1)
    assert len(torch.unique(plan.items[0, :, 4])) <= 10


@pytest.mark.parametrize("workers", [7, 64, 264])
def test_thread_blocks_end_together(workers):
    mask = SparseMask.from_pattern(patterns.Causal(), 4096)
    copies, layout = 24, LAYOUTS["heads"]
    plan = granule_plan(mask, layout, copies, workers, 5)
    items = plan.items[0].double()
    # Of a causal row the run is full, the listed step is not.
    cost = items[:, 3] + 1.25 * items[:, 5] + layout.item_cost
    queue = plan.queue.view(-1, workers)
    load = torch.where(queue >= 0, cost[queue.clamp(0) // copies], 0).sum(0)
    assert load.max() <= load.mean() + 0.4 * cost.max()


BANDS = [
    patterns.SlidingWindow(64, 0),
    patterns.Dilated(150, 3),
    patterns.SlidingWindow(100, 30) & ~patterns.Dilated(40, 2),
    ~patterns.SlidingWindow(90, 50),
    patterns.Causal() & ~patterns.SlidingWindow(200, 0),
]


SHAPES = [(830, 830, 0), (640, 1100, 300), (576, 576, 0), (320, 700, 100)]


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("pattern", BANDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tile_rows_that_repeat_what_the_ones_before_hold(pattern, shape, layout):
    q_len, kv_len, offset = shape
    mask = SparseMask.from_pattern(pattern, q_len, kv_len, q_offset=offset)
    rows, columns = torch.arange(q_len)[:, None] + offset, torch.arange(kv_len)[None]
    none = torch.zeros((), dtype=torch.int64)
    assert torch.equal(mask.to_dense()[0, 0], pattern(none, none, rows, columns))
    check(mask, LAYOUTS[layout], 12, 264)


@pytest.mark.parametrize("pattern", BANDS, ids=str)
def test_work_is_what_the_mask_holds(pattern):
    mask = SparseMask.from_pattern(pattern, 832)
    held = mask.to_dense()[0, 0].view(13, 64, 52, 16).any(3).any(1)
    work = work_of(mask)
    assert work["heads"].items == work["paired"].items == work["triton"].items == 13
    assert work["heads"].loads == work["paired"].loads == held.sum() / 4
    pairs = held[:12].view(6, 2, 52).any(1).sum() / 4 + held[12].sum() / 4
    assert work["rows"].items == 7 and work["rows"].loads == pairs


def test_mask_and_plan_at_131072_tokens_take_little():
    setup = """
from stof_hf.attention.granules import Layout, granule_plan
from stof_hf.masks import SparseMask, patterns as p
"""
    work = """made = [
        p.Causal(),
        p.Longformer(256, (0, 77000)),
        p.BigBird(192, (0,), 3),
        p.Documents(torch.arange(n) // 700) & p.Causal(),
        p.PrefixLM(9000) & ~p.SlidingWindow(300, 300),
    ]
    out = []
    for pattern in made:
        times = []
        # Threads that wait for a core count, too: the least of three is the work's.
        for _ in range(3):
            begin = time.process_time()
            mask = SparseMask.from_pattern(pattern, n)
            plan = granule_plan(mask, Layout(2, False), 12, 264, 12)
            times.append(time.process_time() - begin)
        out.append([repr(pattern)[:20], min(times)])
    return out"""
    _, mib, plans = measure(setup, work, 512, 131072)
    assert mib < 64
    for name, seconds in plans:
        assert seconds < 0.1, name
