"""Triton kernels of the backward: statistics of the rows, gradients, and the sum of split pieces.

FlashAttention-2's backward (Dao, 2023, arXiv 2307.08691) on the work lists of `backward_plan.py`:
with P = exp(S - lse) and delta = rowsum(dO O), dV = P^T dO, dS = P (dO V^T - delta), dQ = dS K and
dK = dS^T Q. Scores are computed twice, once for a block of queries and once, transposed, for a
block of keys: nobody adds to what another block writes, so that equal calls give equal bits.

What Triton specialises on is as in `triton_kernels.py`.
"""

import triton
import triton.language as tl

from .triton_dropout import factor_of, kept_tile
from .triton_kernels import LOG2E, _dot

_PLAIN = (
    "lse_ptr", "stats_ptr", "valid_ptr", "seed_ptr", "items_ptr", "steps_q_ptr", "steps_k_ptr",
    "words_q_ptr", "words_k_ptr", "merges_ptr", "pattern_ptr", "pattern_b", "pattern_h", "valid_b",
    "group", "share", "heads", "copies", "together", "q_len", "kv_len", "n_items_q", "n_items_k",
    "n_merges_q", "n_merges_k", "slots_q", "slots_k",
)  # fmt: skip
_jit = triton.jit(do_not_specialize=_PLAIN)


@_jit
def statistics_kernel(
    out_ptr, grad_ptr, lse_ptr, stats_ptr, g_b, g_h, g_s, heads, q_len, padded,
    unit, DV: tl.constexpr, BDV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of every row -lse / unit and -delta: stats [B, H, padded, 2].

    Rows without keys, and those beyond the last, get minus infinity: their weights are 0 then.
    """
    bh = tl.program_id(0)
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    offs = tl.arange(0, BDV)
    inside = rows < q_len
    mask = inside[:, None] & (offs < DV)[None, :]
    rows64 = rows.to(tl.int64)
    out = tl.load(out_ptr + ((b * q_len + rows64[:, None]) * heads + h) * DV + offs[None, :],
                  mask=mask, other=0.0)  # fmt: skip
    grad = tl.load(grad_ptr + b * g_b + h.to(tl.int64) * g_h + rows64[:, None] * g_s
                   + offs[None, :], mask=mask, other=0.0)  # fmt: skip
    lse = tl.load(lse_ptr + bh.to(tl.int64) * q_len + rows, mask=inside, other=float("-inf"))
    base = tl.where(lse == float("-inf"), float("-inf"), -lse / unit)
    delta = -tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    place = stats_ptr + (bh.to(tl.int64) * padded + rows)[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(place, tl.join(base, delta))


@triton.jit
def _pairs(ptrs, INTERPRETED: tl.constexpr):
    """The two fp32 numbers at each pointer.

    By an instruction of its own: Triton would copy them to shared memory first, each thread all
    those that it needs.
    """
    if INTERPRETED:
        return tl.load(ptrs), tl.load(ptrs + 1)
    return tl.inline_asm_elementwise(
        "ld.global.v2.f32 {$0, $1}, [$2];", "=f,=f,l", [ptrs], (tl.float32, tl.float32), True, 1
    )


@triton.jit
def _words(ptrs, bits, INTERPRETED: tl.constexpr):
    """Both halves of the word at each pointer: of a full tile (-1) ones, of none (-2) zeros."""
    whole = tl.where(bits == -1, -1, 0)
    if INTERPRETED:
        inside = bits >= 0
        return tl.load(ptrs, inside, whole), tl.load(ptrs + 1, inside, whole)
    return tl.inline_asm_elementwise(
        """{ .reg .pred stored; setp.ge.s32 stored, $3, 0; mov.b32 $0, $4; mov.b32 $1, $4;
        @stored ld.global.v2.b32 {$0, $1}, [$2]; }""",
        "=&r,=&r,l,r,r", [ptrs, bits, whole], (tl.int32, tl.int32), True, 1,
    )  # fmt: skip


@triton.jit
def _allowed(p, low, high, INTERPRETED: tl.constexpr):
    """p where a bit of the rows' words allows it, else 0."""
    lane = tl.arange(0, 64)
    none = tl.full([], 0, tl.int32)
    if not INTERPRETED:
        # A volatile move keeps the branch around this: else all bits are tested of full tiles, too.
        # Of a scalar: a tensor's would be repeated in every layout that the compiler tries.
        none = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [none], tl.int32, False, 1)
    word = tl.where(lane[None, :] < 32, low[:, None], high[:, None])
    bit = tl.full([64], 1, tl.int32) << ((lane + none) & 31)
    return tl.where((word & bit[None, :]) != 0, p, 0.0)


@triton.jit
def _add_tile(
    dx, dy, own_x, own_y, base, delta, x_ptr, y_ptr, stats_ptr, valid_ptr, words_ptr, tile, bits,
    above, x_s, y_s, other_len, padded, scale, softcap, seed, head, block,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, LISTED: tl.constexpr, WHOLE: tl.constexpr, VALID: tl.constexpr,
    SIMPLE: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """dS X and P Y of one tile of 64 others, added to dx and (of a block of keys) dy."""
    lane = tl.arange(0, 64)
    offs_d = tl.arange(0, BD)
    offs_dv = tl.arange(0, BDV)
    # Known to be true where no padding of the head size is needed.
    x_mask = (offs_d < D)[:, None]
    y_mask = (offs_dv < DV)[:, None]
    n = tile * 64 + lane
    if not WHOLE:
        inside = n < other_len
        x_mask = x_mask & inside[None, :]
        y_mask = y_mask & inside[None, :]
    if LISTED:
        masked = bits != -1
        row = tl.arange(0, ROWS)
        index = tl.zeros([ROWS], tl.int32) + bits
        if ROWS == 128:
            masked = masked | (above != -1)
            index = tl.where(row >= 64, above, index)
        place = words_ptr + index.to(tl.int64) * 128 + row % 64 * 2
        low, high = _words(place, index, INTERPRETED)
    first = tile.to(tl.int64) * 64
    x = tl.load(x_ptr + first * x_s + (lane[None, :] * x_s + offs_d[:, None]),
                mask=x_mask, other=0.0)  # fmt: skip
    y = tl.load(y_ptr + first * y_s + (lane[None, :] * y_s + offs_dv[:, None]),
                mask=y_mask, other=0.0)  # fmt: skip
    if KEYS:
        base, delta = _pairs(stats_ptr + first * 2 + lane * 2, INTERPRETED)
        base, delta = base[None, :], delta[None, :]
    # What is added to every sum is where that begins: it need not wait in registers beside it.
    zeros = tl.zeros([ROWS, 64], tl.float32)
    start = delta / factor_of(DROPOUT) if DROPOUT else delta
    if SIMPLE:
        s = _dot(own_x, x, zeros + base, INTERPRETED)
        dp = _dot(own_y, y, zeros + start, INTERPRETED)
        p = tl.exp2(s * (scale * LOG2E))
    else:
        s = _dot(own_x, x, zeros, INTERPRETED) * scale
        dp = _dot(own_y, y, zeros + start, INTERPRETED)
        if SOFTCAP:
            t = 2 * tl.sigmoid(2 * (s / softcap)) - 1
            s = t * softcap
        p = tl.exp2(s * LOG2E + base)
    if LISTED and masked:
        p = _allowed(p, low, high, INTERPRETED)
    if VALID and not KEYS:
        w = tl.load(valid_ptr + (n >> 5), mask=n < other_len, other=0)
        p = tl.where((((w >> (n & 31)) & 1) != 0)[None, :], p, 0.0)
    if DROPOUT:
        kept = kept_tile(
            seed, head, tile if KEYS else block, block if KEYS else tile, KEYS, DROPOUT,
            INTERPRETED,
        )  # fmt: skip
        dp = tl.where(kept, dp * factor_of(DROPOUT), delta)
    ds = p * dp
    if SOFTCAP:
        ds = ds * (1 - t * t)
    if DROPOUT and KEYS:
        p = tl.where(kept, p, 0.0)
    if KEYS:
        dy = _dot(p.to(y.dtype), tl.trans(y), dy, INTERPRETED)
    dx = _dot(ds.to(x.dtype), tl.trans(x), dx, INTERPRETED)
    return dx, dy


@triton.jit
def _listed(steps_ptr, i, count, ROWS: tl.constexpr):
    """Of step i: the tile, and what the bitmaps of the first and the second 64 rows are."""
    step = steps_ptr + i * (1 + ROWS // 64)
    tile = tl.load(step, mask=i < count, other=0)
    bits = tl.load(step + 1, mask=i < count, other=-1)
    above = bits
    if ROWS == 128:
        above = tl.load(step + 2, mask=i < count, other=-1)
    return tile, bits, above


@triton.jit
def _walk(
    own_x, own_y, base, delta, x_ptr, y_ptr, stats_ptr, valid_ptr, steps_ptr, words_ptr,
    first_tile, n_full, n_part, share, x_h, x_s, y_h, y_s, other_len, padded, scale, softcap,
    seed, head, block, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    ROWS: tl.constexpr, UNIT: tl.constexpr, KEYS: tl.constexpr, SHARED: tl.constexpr,
    WHOLE: tl.constexpr, VALID: tl.constexpr, SIMPLE: tl.constexpr, SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr, DROPOUT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Sums over the tiles of a work item, dX [ROWS, BD] and dY [ROWS, BDV]: of a block of keys
    those of all heads that share it, of a block of queries dX alone."""
    dx = tl.zeros([ROWS, BD], tl.float32)
    dy = tl.zeros([ROWS, BDV if KEYS else 16], tl.float32)
    # What a listed step needs to know is loaded one step ahead.
    tile, bits, above = _listed(steps_ptr, 0, n_part, ROWS)
    if UNIT > 0:
        # By the format's contract full tiles hold no key beyond the last, but queries.
        for i in tl.range(0, n_full * share, num_stages=STAGES):
            x_head, y_head, stats, at, of = x_ptr, y_ptr, stats_ptr, i, head
            if SHARED:
                at = i % n_full
                of = head + i // n_full
                g = (i // n_full).to(tl.int64)
                x_head, y_head, stats = x_ptr + g * x_h, y_ptr + g * y_h, stats_ptr + g * 2 * padded
            dx, dy = _add_tile(
                dx, dy, own_x, own_y, base, delta, x_head, y_head, stats, valid_ptr, words_ptr,
                first_tile + at, 0, 0, x_s, y_s, other_len, padded, scale, softcap, seed, of, block,
                D, DV, BD, BDV, ROWS, KEYS, False, WHOLE or not KEYS, VALID, SIMPLE, SOFTCAP,
                DROPOUT, INTERPRETED,
            )  # fmt: skip
    for i in tl.range(0, n_part * share, num_stages=STAGES):
        x_head, y_head, stats, following, of = x_ptr, y_ptr, stats_ptr, i + 1, head
        if SHARED:
            following = following % n_part
            of = head + i // n_part
            g = (i // n_part).to(tl.int64)
            x_head, y_head, stats = x_ptr + g * x_h, y_ptr + g * y_h, stats_ptr + g * 2 * padded
        dx, dy = _add_tile(
            dx, dy, own_x, own_y, base, delta, x_head, y_head, stats, valid_ptr, words_ptr, tile,
            bits, above, x_s, y_s, other_len, padded, scale, softcap, seed, of, block, D, DV, BD,
            BDV, ROWS, KEYS, True, WHOLE, VALID, SIMPLE, SOFTCAP, DROPOUT, INTERPRETED,
        )  # fmt: skip
        tile, bits, above = _listed(steps_ptr, following, n_part, ROWS)
    return dx, dy


@triton.jit
def _rows(ptr, rows, s, length, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """ROWS x PADDED elements, zeros beyond the tensor."""
    offs = tl.arange(0, PADDED)
    inside = (rows < length)[:, None] & (offs < SIZE)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * s + offs[None, :], mask=inside, other=0.0)


@triton.jit
def _store(ptr, rows, s, length, x, SIZE: tl.constexpr, PADDED: tl.constexpr):
    offs = tl.arange(0, PADDED)
    inside = (rows < length)[:, None] & (offs < SIZE)[None, :]
    ptrs = ptr + rows.to(tl.int64)[:, None] * s + offs[None, :]
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _store_piece(ptr, at, x, ROWS: tl.constexpr, WIDE: tl.constexpr, PADDED: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None]
    tl.store(ptr + (at * ROWS + rows) * WIDE + tl.arange(0, PADDED)[None, :], x)


@_jit
def gradients_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, stats_ptr, dq_ptr, dk_ptr, dv_ptr, part_q_ptr, part_k_ptr,
    valid_ptr, seed_ptr, items_ptr, steps_q_ptr, words_q_ptr, steps_k_ptr, words_k_ptr,
    pattern_ptr,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, g_b, g_h, g_s, dq_b, dq_h, dq_s, dk_b, dk_h, dk_s,
    dv_b, dv_h, dv_s, pattern_b, pattern_h, valid_b, group, share, heads, copies, together, q_len,
    kv_len, padded, n_items_q, n_items_k, slots_q, slots_k, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    ROWS: tl.constexpr, UNIT: tl.constexpr, SPLIT: tl.constexpr, PATTERNS: tl.constexpr,
    SHARED: tl.constexpr, WHOLE_Q: tl.constexpr, WHOLE_K: tl.constexpr, VALID: tl.constexpr,
    SIMPLE: tl.constexpr, SOFTCAP: tl.constexpr, STAGES: tl.constexpr, DROPOUT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One work item: a block of ROWS keys, for `share` query heads, or a block of ROWS queries.

    The grid runs over groups of `together` times `share` query heads, whose tensors stay in L2: in
    each first the blocks of keys, then those of queries, heaviest first. With WHOLE_Q and WHOLE_K
    the lengths are multiples of 64. DROPOUT is the threshold of `dropout.py` or 0: none; else ROWS
    is 64.
    """
    tl.static_assert(DROPOUT == 0 or ROWS == 64)
    of_keys = together * n_items_k
    per_group = of_keys + together * share * n_items_q
    group_id = tl.program_id(0) // per_group
    index = tl.program_id(0) % per_group
    is_keys = index < of_keys
    # Of a block of keys, copies are counted in `share` heads.
    heads_each = tl.where(is_keys, share, 1)
    width = together * share // heads_each
    index -= tl.where(is_keys, 0, of_keys)
    item = index // width + tl.where(is_keys, 0, n_items_k)
    copy = group_id * width + index % width
    if copy * heads_each >= copies:
        return
    b = copy * heads_each // heads
    h = copy * heads_each % heads
    entry = items_ptr + item * 6
    if PATTERNS:
        pattern = tl.load(pattern_ptr + b * pattern_b + h * pattern_h)
        entry += pattern * (n_items_q + n_items_k) * 6
    block = tl.load(entry)
    if block < 0:
        return
    first_tile = tl.load(entry + 1)
    n_full = tl.load(entry + 2)
    first_step = tl.load(entry + 3)
    n_part = tl.load(entry + 4)
    slot = tl.load(entry + 5)

    WIDTH: tl.constexpr = 1 + ROWS // 64
    rows = block * ROWS + tl.arange(0, ROWS)
    b64, h64, hk64 = b.to(tl.int64), h.to(tl.int64), (h // group).to(tl.int64)
    q_ptr += b64 * q_b + h64 * q_h
    k_ptr += b64 * k_b + hk64 * k_h
    v_ptr += b64 * v_b + hk64 * v_h
    grad_ptr += b64 * g_b + h64 * g_h
    stats_ptr += (b64 * heads + h64) * 2 * padded
    if VALID:
        valid_ptr += b * valid_b
    seed = tl.load(seed_ptr) if DROPOUT else 0
    head = copy * heads_each
    if is_keys:
        k = _rows(k_ptr, rows, k_s, kv_len, D, BD)
        v = _rows(v_ptr, rows, v_s, kv_len, DV, BDV)
        if VALID:
            w = tl.load(valid_ptr + (rows >> 5), mask=rows < kv_len, other=0)
            seen = (w >> (rows & 31)) & 1
            # Where all keys are padding, nothing is to be added up.
            some = tl.max(seen, 0)
            n_full *= some
            n_part *= some
        dk, dv = _walk(
            k, v, 0.0, 0.0, q_ptr, grad_ptr, stats_ptr, valid_ptr,
            steps_k_ptr + first_step * WIDTH, words_k_ptr, first_tile, n_full, n_part, share,
            q_h, q_s, g_h, g_s, q_len, padded, scale, softcap, seed, head, block, D, DV, BD, BDV,
            ROWS, UNIT, True, SHARED, WHOLE_Q, VALID, SIMPLE, SOFTCAP, STAGES, DROPOUT, INTERPRETED,
        )  # fmt: skip
        if DROPOUT:
            dv *= factor_of(DROPOUT)
        if VALID:
            dk = tl.where(seen[:, None] != 0, dk, 0.0)
            dv = tl.where(seen[:, None] != 0, dv, 0.0)
        whole = True
        if SPLIT:
            whole = slot < 0
            if slot >= 0:
                at = copy.to(tl.int64) * slots_k + slot
                _store_piece(part_k_ptr, at, dk, ROWS, BD + BDV, BD)
                _store_piece(part_k_ptr + BD, at, dv, ROWS, BD + BDV, BDV)
        if whole:
            out_h = (h // heads_each).to(tl.int64)
            dk_rows = dk_ptr + b64 * dk_b + out_h * dk_h
            dv_rows = dv_ptr + b64 * dv_b + out_h * dv_h
            _store(dk_rows, rows, dk_s, kv_len, dk * scale, D, BD)
            _store(dv_rows, rows, dv_s, kv_len, dv, DV, BDV)
    else:
        q = _rows(q_ptr, rows, q_s, q_len, D, BD)
        grad = _rows(grad_ptr, rows, g_s, q_len, DV, BDV)
        base, delta = _pairs(stats_ptr + rows * 2, INTERPRETED)
        dq, _ = _walk(
            q, grad, base[:, None], delta[:, None], k_ptr, v_ptr, stats_ptr, valid_ptr,
            steps_q_ptr + first_step * WIDTH, words_q_ptr, first_tile, n_full, n_part, 1,
            k_h, k_s, v_h, v_s, kv_len, padded, scale, softcap, seed, head, block, D, DV, BD, BDV,
            ROWS, UNIT, False, False, WHOLE_K, VALID, SIMPLE, SOFTCAP, STAGES, DROPOUT, INTERPRETED,
        )  # fmt: skip
        whole = True
        if SPLIT:
            whole = slot < 0
            if slot >= 0:
                at = copy.to(tl.int64) * slots_q + slot
                _store_piece(part_q_ptr, at, dq, ROWS, BD, BD)
        if whole:
            dq_rows = dq_ptr + b64 * dq_b + h64 * dq_h
            _store(dq_rows, rows, dq_s, q_len, dq * scale, D, BD)


@triton.jit
def _sum_of(ptr, first, count, rows, ROWS: tl.constexpr, CUT: tl.constexpr, WIDE: tl.constexpr,
            PADDED: tl.constexpr):  # fmt: skip
    total = tl.zeros([CUT, PADDED], tl.float32)
    for i in range(count):
        place = ((first + i) * ROWS + rows[:, None]) * WIDE + tl.arange(0, PADDED)[None, :]
        total += tl.load(ptr + place)
    return total


@_jit
def sum_kernel(
    dq_ptr, dk_ptr, dv_ptr, part_q_ptr, part_k_ptr, merges_ptr, pattern_ptr,
    dq_b, dq_h, dq_s, dk_b, dk_h, dk_s, dv_b, dv_h, dv_s, pattern_b, pattern_h, share, heads,
    q_len, kv_len, n_merges_q, n_merges_k, slots_q, slots_k, scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, ROWS: tl.constexpr,
    CUT: tl.constexpr,
):  # fmt: skip
    """Add up the pieces of a split block, in order, for CUT of its rows."""
    entry = tl.program_id(1) // (ROWS // CUT)
    cut = tl.program_id(1) % (ROWS // CUT) * CUT + tl.arange(0, CUT)
    is_keys = entry < n_merges_k
    heads_each = tl.where(is_keys, share, 1)
    copy = tl.program_id(0) // heads_each
    if tl.program_id(0) % heads_each != 0:
        return
    b = tl.program_id(0) // heads
    h = tl.program_id(0) % heads
    pattern = tl.load(pattern_ptr + b * pattern_b + h * pattern_h)
    place = merges_ptr + (pattern * (n_merges_q + n_merges_k) + entry) * 3
    block = tl.load(place)
    if block < 0:
        return
    slot = tl.load(place + 1)
    count = tl.load(place + 2)
    rows = block * ROWS + cut
    b64, h64 = b.to(tl.int64), (h // heads_each).to(tl.int64)
    if is_keys:
        first = copy.to(tl.int64) * slots_k + slot
        dk = _sum_of(part_k_ptr, first, count, cut, ROWS, CUT, BD + BDV, BD)
        _store(dk_ptr + b64 * dk_b + h64 * dk_h, rows, dk_s, kv_len, dk * scale, D, BD)
        dv = _sum_of(part_k_ptr + BD, first, count, cut, ROWS, CUT, BD + BDV, BDV)
        _store(dv_ptr + b64 * dv_b + h64 * dv_h, rows, dv_s, kv_len, dv, DV, BDV)
    else:
        first = copy.to(tl.int64) * slots_q + slot
        dq = _sum_of(part_q_ptr, first, count, cut, ROWS, CUT, BD, BD)
        _store(dq_ptr + b64 * dq_b + h64 * dq_h, rows, dq_s, q_len, dq * scale, D, BD)
