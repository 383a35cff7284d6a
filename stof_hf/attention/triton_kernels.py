"""Triton kernels: block-wise, row-wise with split over keys, and the combination of pieces.

All compute softmax in base 2 with fp32 accumulation. A mask arrives as the plan of `plan.py`; a row
word is read as two 32-bit halves, since GPUs shift 32-bit registers. Rows without keys keep a
maximum of minus infinity, which is replaced by 0 wherever it is subtracted.

Triton compiles a kernel again wherever an integer becomes 1 or is no longer a multiple of 16, or a
pointer is not. Only the strides and pointers of what is loaded in vectors are left to it: lengths,
counts and batches may change without another compilation.
"""

import triton
import triton.language as tl

from ..kernels.dependent import await_kernels_before
from . import relative
from .triton_dropout import factor_of, kept_tile

#: Kinds of biases: an element for each pair, whose strides may be 0, or `relative.RelativeBias`.
NO_BIAS = tl.constexpr(0)
BY_PAIR = tl.constexpr(1)
BY_DISTANCE = tl.constexpr(2)
COPIES = tl.constexpr(relative.COPIES)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)

#: Arguments of any kernel here whose value decides no load's width.
_PLAIN = (
    "lse_ptr", "part_ml_ptr", "valid_ptr", "sinks_ptr", "seed_ptr", "row_start", "col_start",
    "table_ptr", "items_ptr", "steps_ptr", "merges_ptr", "words_ptr", "pattern_ptr", "bias_b",
    "bias_h", "bias_m", "pattern_b", "pattern_h", "valid_b", "group", "heads", "copies", "q_len",
    "kv_len", "tile_rows", "tile_cols", "n_items", "n_merges", "slots", "splits",
)  # fmt: skip
#: Whether these are 1 does.
_ONE = ("bias_n", "take")
_jit = triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=_ONE)


@triton.jit
def _dot(a, b, acc, INTERPRETED: tl.constexpr):
    # Triton's interpreter computes bf16 products wrongly.
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def _bias_rows(offs_m, bias_m, q_len, BIAS: tl.constexpr):
    """Where the bias of each query begins, behind that of its head."""
    if BIAS == BY_DISTANCE:
        # Of the table, from the key at the query's distance from the first one on.
        first = q_len - 1 - offs_m
        return (first % COPIES).to(tl.int64) * bias_m + first // COPIES * COPIES
    return offs_m.to(tl.int64) * bias_m


@triton.jit
def _scores(s, bias_ptr, bias_rows, offs_n, bias_n, inside, scale, softcap,
            SOFTCAP: tl.constexpr, BIAS: tl.constexpr):  # fmt: skip
    """Scores, softcap and bias applied, from products of query and key."""
    if SOFTCAP:
        s = softcap * (2 * tl.sigmoid(2 * (s * scale / softcap)) - 1)
    else:
        s = s * scale
    if BIAS:
        ptrs = (bias_ptr + bias_rows)[:, None] + (offs_n.to(tl.int64) * bias_n)[None, :]
        s += tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
    return s


@triton.jit
def _accumulate(s, v, m, l, acc, factor, INTERPRETED: tl.constexpr, seed=0, copy=0, q_tile=0,
                k_tile=0, DROPOUT: tl.constexpr = 0):  # fmt: skip
    """One step of online softmax: s * factor are base-2 scores, minus infinity where masked.

    The scale stays in the exponent: one fused multiply-add an element. What is dropped counts in
    the denominator.
    """
    m_new = tl.maximum(m, tl.max(s, 1) * factor)
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s * factor - base[:, None])
    alpha = tl.exp2(m - base)
    l = l * alpha + tl.sum(p, 1)
    if DROPOUT:
        kept = kept_tile(seed, copy, q_tile, k_tile, False, DROPOUT, INTERPRETED)
        p = tl.where(kept, p, 0.0)
    acc = _dot(p.to(v.dtype), v, acc * alpha[:, None], INTERPRETED)
    return m_new, l, acc


@triton.jit
def _finish(acc, m, l, sink, SINKS: tl.constexpr):
    """(normalised rows, natural log-sum-exp)."""
    if SINKS:
        top = tl.maximum(m, sink * LOG2E)
        # A sink of minus infinity on an empty row leaves the row empty.
        base = tl.where(top == float("-inf"), 0.0, top)
        alpha = tl.exp2(m - base)
        acc = acc * alpha[:, None]
        l = l * alpha + tl.exp2(sink * LOG2E - base)
        m = top
    lse = tl.where(l > 0, m * LN2 + tl.log(l), float("-inf"))
    return acc * (1.0 / tl.where(l > 0, l, 1.0))[:, None], lse


@triton.jit
def _step(steps_ptr, words_ptr, i, count, upper, row_lane, WIDTH: tl.constexpr):
    """Of step i: key tile, whether it has a bitmap, and the two halves of each row's word."""
    step = steps_ptr + i * WIDTH
    tile = tl.load(step, mask=i < count, other=0)
    bits = tl.load(step + 1, mask=i < count, other=-1)
    masked = bits != -1
    if WIDTH == 3:
        above = tl.load(step + 2, mask=i < count, other=-1)
        masked = masked | (above != -1)
        bits = tl.where(upper, above, bits)
    else:
        bits = tl.zeros_like(row_lane) + bits
    place = words_ptr + (bits.to(tl.int64) * 64 + row_lane) * 2
    whole = tl.where(bits == -1, -1, 0)
    low = tl.load(place, mask=bits >= 0, other=whole)
    return tile, masked, low, tl.load(place + 1, mask=bits >= 0, other=whole)


@triton.jit
def _masked(s, low, high, lane, column_bit, INTERPRETED: tl.constexpr):
    if not INTERPRETED:
        # A volatile move keeps the branch around this: without it, the tests of all bits are made
        # before the product is there, and their results packed and unpacked.
        low = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [low], tl.int32, False, 1)
    word = tl.where(lane[None, :] < 32, low[:, None], high[:, None])
    return tl.where((word & column_bit) != 0, s, float("-inf"))


@_jit
def block_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, part_ptr, part_ml_ptr,
    valid_ptr, bias_ptr, sinks_ptr, seed_ptr, items_ptr, steps_ptr, words_ptr, pattern_ptr,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, bias_b, bias_h, bias_m, bias_n,
    pattern_b, pattern_h, valid_b, group, heads, copies, q_len, kv_len, n_items, slots,
    scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    ROWS: tl.constexpr, UNIT: tl.constexpr, SPLIT: tl.constexpr, PATTERNS: tl.constexpr,
    WHOLE: tl.constexpr, VALID: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    BIAS_ALIGNED: tl.constexpr, SINKS: tl.constexpr, LSE: tl.constexpr, SIMPLE: tl.constexpr,
    STAGES: tl.constexpr, INTERPRETED: tl.constexpr, DEPENDENT: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """Attention of one work item: ROWS query rows against one piece of their keys.

    The grid is (heads of a group, items, groups): a group's keys stay in L2, and its items start
    heaviest first. With WHOLE, kv_len is a multiple of 64. DROPOUT is the threshold of `dropout.py`
    or 0: none; else ROWS is 64 and UNIT 0.
    """
    await_kernels_before(DEPENDENT)
    bh = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    if bh >= copies:
        return
    b = bh // heads
    h = bh % heads
    hk = h // group
    entry = items_ptr + tl.program_id(1) * 6
    if PATTERNS:
        pattern = tl.load(pattern_ptr + b * pattern_b + h * pattern_h)
        entry += pattern * n_items * 6
    block = tl.load(entry)
    if block < 0:
        return
    first_tile = tl.load(entry + 1)
    n_full = tl.load(entry + 2)
    first_step = tl.load(entry + 3)
    n_part = tl.load(entry + 4)
    slot = tl.load(entry + 5)

    offs_m = block * ROWS + tl.arange(0, ROWS)
    offs_d = tl.arange(0, BD)
    offs_dv = tl.arange(0, BDV)
    lane = tl.arange(0, 64)
    rows_in = offs_m < q_len
    b64, h64, hk64 = b.to(tl.int64), h.to(tl.int64), hk.to(tl.int64)
    q_ptr += b64 * q_b + h64 * q_h
    k_ptr += b64 * k_b + hk64 * k_h
    v_ptr += b64 * v_b + hk64 * v_h
    if BIAS_ALIGNED:
        # Multiples already: now Triton knows.
        bias_b, bias_h = bias_b // 16 * 16, bias_h // 16 * 16
        bias_m, kv_len = bias_m // 16 * 16, kv_len // 16 * 16
    bias_rows = _bias_rows(offs_m, bias_m, q_len, BIAS)
    if BIAS:
        bias_ptr += b64 * bias_b + h64 * bias_h
    if VALID:
        valid_ptr += b * valid_b
    q_ptrs = q_ptr + offs_m[:, None].to(tl.int64) * q_s + offs_d[None, :]
    # Known to be true where no padding of the head size is needed.
    d_in = offs_d < D
    dv_in = offs_dv < DV
    q = tl.load(q_ptrs, mask=rows_in[:, None] & d_in[None, :], other=0.0)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BDV], tl.float32)

    factor = scale * LOG2E if SIMPLE else LOG2E
    seed = tl.load(seed_ptr) if DROPOUT else 0

    # What a listed step needs to know is loaded one step ahead.
    WIDTH: tl.constexpr = 1 + ROWS // 64
    steps_ptr += first_step * WIDTH
    row_lane = tl.arange(0, ROWS) % 64
    upper = tl.arange(0, ROWS) >= 64
    tile, masked, low, high = _step(steps_ptr, words_ptr, 0, n_part, upper, row_lane, WIDTH)

    tl.static_assert(DROPOUT == 0 or (ROWS == 64 and UNIT == 0))
    if UNIT > 0:
        # The full run, UNIT tiles a step: no bitmaps, and by the format's contract no key beyond
        # the last.
        WIDE: tl.constexpr = 64 * UNIT
        wide = tl.arange(0, WIDE)
        for i in tl.range(0, n_full // UNIT, num_stages=STAGES):
            start = first_tile + i * UNIT
            first_key = start.to(tl.int64) * 64
            k_tile = k_ptr + first_key * k_s + (wide[None, :] * k_s + offs_d[:, None])
            k = tl.load(k_tile, mask=d_in[:, None], other=0.0)
            s = _dot(q, k, tl.zeros([ROWS, WIDE], tl.float32), INTERPRETED)
            n = start * 64 + wide
            if not SIMPLE:
                s = _scores(s, bias_ptr, bias_rows, n, bias_n, rows_in[:, None], scale, softcap,
                            SOFTCAP, BIAS)  # fmt: skip
            if VALID:
                w = tl.load(valid_ptr + (n >> 5))
                s = tl.where((((w >> (n & 31)) & 1) != 0)[None, :], s, float("-inf"))
            v_tile = v_ptr + first_key * v_s + (wide[:, None] * v_s + offs_dv[None, :])
            v = tl.load(v_tile, mask=dv_in[None, :], other=0.0)
            m, l, acc = _accumulate(s, v, m, l, acc, factor, INTERPRETED)

    # Listed tiles, with one 64-bit word for each row.
    k_offs = lane[None, :] * k_s + offs_d[:, None]
    v_offs = lane[:, None] * v_s + offs_dv[None, :]
    column_bit = (tl.full([64], 1, tl.int32) << (lane & 31))[None, :]
    for i in tl.range(0, n_part, num_stages=STAGES):
        first_key = tile.to(tl.int64) * 64
        keys_in = tl.full([64], True, tl.int1) if WHOLE else lane < kv_len - tile * 64
        k_mask = keys_in[None, :] & d_in[:, None]
        k = tl.load(k_ptr + first_key * k_s + k_offs, mask=k_mask, other=0.0)
        s = _dot(q, k, tl.zeros([ROWS, 64], tl.float32), INTERPRETED)
        n = tile * 64 + lane
        if not SIMPLE:
            s = _scores(s, bias_ptr, bias_rows, n, bias_n, rows_in[:, None] & keys_in[None, :],
                        scale, softcap, SOFTCAP, BIAS)  # fmt: skip
        if masked:
            s = _masked(s, low, high, lane, column_bit, INTERPRETED)
        if VALID:
            w = tl.load(valid_ptr + (n >> 5), mask=keys_in, other=0)
            s = tl.where((((w >> (n & 31)) & 1) != 0)[None, :], s, float("-inf"))
        v_mask = keys_in[:, None] & dv_in[None, :]
        v = tl.load(v_ptr + first_key * v_s + v_offs, mask=v_mask, other=0.0)
        k_tile = tile
        tile, masked, low, high = _step(steps_ptr, words_ptr, i + 1, n_part, upper, row_lane, WIDTH)
        m, l, acc = _accumulate(
            s, v, m, l, acc, factor, INTERPRETED, seed, bh, block, k_tile, DROPOUT
        )
    if DROPOUT:
        acc *= factor_of(DROPOUT)

    if SPLIT:
        if slot >= 0:
            at = bh.to(tl.int64) * slots + slot
            rows = tl.arange(0, ROWS)
            tl.store(part_ptr + (at * ROWS + rows[:, None]) * BDV + offs_dv[None, :], acc)
            tl.store(part_ml_ptr + at * 2 * ROWS + rows, m)
            tl.store(part_ml_ptr + at * 2 * ROWS + ROWS + rows, l)
            return
    sink = 0.0
    if SINKS:
        sink = tl.load(sinks_ptr + h).to(tl.float32)
    o, lse = _finish(acc, m, l, sink, SINKS)
    out_rows = out_ptr + ((b64 * q_len + offs_m[:, None]) * heads + h) * DV + offs_dv[None, :]
    o_mask = rows_in[:, None]
    if BDV != DV:
        o_mask = o_mask & (offs_dv[None, :] < DV)
    tl.store(out_rows, o.to(out_ptr.dtype.element_ty), mask=o_mask)
    if LSE:
        tl.store(lse_ptr + bh.to(tl.int64) * q_len + offs_m, lse, mask=rows_in)


@_jit
def merge_kernel(
    out_ptr, lse_ptr, part_ptr, part_ml_ptr, sinks_ptr, merges_ptr, pattern_ptr,
    pattern_b, pattern_h, heads, q_len, n_merges, slots,
    DV: tl.constexpr, BDV: tl.constexpr, ROWS: tl.constexpr, CUT: tl.constexpr, SINKS: tl.constexpr,
    LSE: tl.constexpr,
):  # fmt: skip
    """Combine the pieces of a split block, in order, for CUT of its rows."""
    entry = tl.program_id(1) // (ROWS // CUT)
    rows = tl.program_id(1) % (ROWS // CUT) * CUT + tl.arange(0, CUT)
    bh = tl.program_id(0)
    b = bh // heads
    h = bh % heads
    pattern = tl.load(pattern_ptr + b * pattern_b + h * pattern_h)
    place = merges_ptr + (pattern * n_merges + entry) * 3
    block = tl.load(place)
    if block < 0:
        return
    first = bh.to(tl.int64) * slots + tl.load(place + 1)
    count = tl.load(place + 2)
    offs_dv = tl.arange(0, BDV)
    m = tl.full([CUT], float("-inf"), tl.float32)
    l = tl.zeros([CUT], tl.float32)
    acc = tl.zeros([CUT, BDV], tl.float32)
    for i in range(count):
        at = first + i
        m_i = tl.load(part_ml_ptr + at * 2 * ROWS + rows)
        l_i = tl.load(part_ml_ptr + at * 2 * ROWS + ROWS + rows)
        o_i = tl.load(part_ptr + (at * ROWS + rows[:, None]) * BDV + offs_dv[None, :])
        m_new = tl.maximum(m, m_i)
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        old = tl.exp2(m - base)
        new = tl.exp2(m_i - base)
        l = l * old + l_i * new
        acc = acc * old[:, None] + o_i * new[:, None]
        m = m_new
    sink = 0.0
    if SINKS:
        sink = tl.load(sinks_ptr + h).to(tl.float32)
    o, lse = _finish(acc, m, l, sink, SINKS)
    offs_m = block * ROWS + rows
    rows_in = offs_m < q_len
    out_rows = (
        out_ptr + ((b.to(tl.int64) * q_len + offs_m[:, None]) * heads + h) * DV + offs_dv[None, :]
    )
    tl.store(
        out_rows, o.to(out_ptr.dtype.element_ty), mask=rows_in[:, None] & (offs_dv[None, :] < DV)
    )
    if LSE:
        tl.store(lse_ptr + bh.to(tl.int64) * q_len + offs_m, lse, mask=rows_in)


@triton.jit
def _row_step(steps_ptr, words_ptr, i, end):
    """Key tile of step i, and the two halves of the row's word in it; zeros beyond the last."""
    tile = tl.load(steps_ptr + i * 2, mask=i < end, other=0)
    bits = tl.load(steps_ptr + i * 2 + 1, mask=i < end, other=-2)
    place = words_ptr + bits.to(tl.int64) * 128
    whole = tl.where(bits == -1, -1, 0)
    low = tl.load(place, mask=bits >= 0, other=whole)
    return tile, low, tl.load(place + 1, mask=bits >= 0, other=whole)


@triton.jit
def _row_scores(s, bias_rows, bias_offs, seen, scale, softcap,
                SOFTCAP: tl.constexpr, BIAS: tl.constexpr):  # fmt: skip
    """Scores in base 2, minus infinity where not seen."""
    if SOFTCAP:
        s = softcap * (2 * tl.sigmoid(2 * (s * scale / softcap)) - 1)
    else:
        s = s * scale
    if BIAS:
        bias = tl.load(bias_rows[:, None] + bias_offs[None, :], mask=seen, other=0.0)
        s += bias.to(tl.float32)
    return tl.where(seen, s * LOG2E, float("-inf"))


@_jit
def row_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, part_ptr, part_ml_ptr,
    valid_ptr, bias_ptr, sinks_ptr, row_start, col_start, table_ptr, steps_ptr, words_ptr,
    pattern_ptr,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, bias_b, bias_h, bias_m, bias_n,
    pattern_b, pattern_h, valid_b, heads, q_len, kv_len, tile_rows, tile_cols, keys_per_split,
    splits, scale, softcap,
    GROUP: tl.constexpr, TAKE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
    BDV: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
    MASK: tl.constexpr, LISTED: tl.constexpr, PATTERNS: tl.constexpr,
    ROW_TENSOR: tl.constexpr, COL_TENSOR: tl.constexpr, COL: tl.constexpr, WHOLE: tl.constexpr,
    VALID: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, BIAS_ALIGNED: tl.constexpr,
    SINKS: tl.constexpr, LSE: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """TAKE query rows of all GROUP heads that share a key head, against one share of their keys.

    With LISTED there is a single row, and table_ptr says where the tiles that it holds begin in
    steps_ptr and how many they are: the splits share those. Else the tile of each element is looked
    up in the tile table, each split takes a range of keys, and keys that no row may see are not
    loaded. The view may begin at any row and column; without COL at column 0.
    With WHOLE, kv_len is a multiple of 64.
    """
    part_id = tl.program_id(1)
    kv_heads = heads // GROUP
    b = tl.program_id(0) // kv_heads
    hk = tl.program_id(0) % kv_heads
    take = part_id // splits
    split = part_id % splits
    lane = tl.arange(0, ROWS)
    offs_m = take * TAKE + lane // GROUP
    h = hk * GROUP + lane % GROUP
    rows_in = (lane < TAKE * GROUP) & (offs_m < q_len)
    offs_d = tl.arange(0, BD)
    offs_dv = tl.arange(0, BDV)
    b64, hk64 = b.to(tl.int64), hk.to(tl.int64)
    q_ptrs = (
        q_ptr
        + b64 * q_b
        + h[:, None].to(tl.int64) * q_h
        + offs_m[:, None].to(tl.int64) * q_s
        + offs_d[None, :]
    )
    q = tl.load(q_ptrs, mask=rows_in[:, None] & (offs_d[None, :] < D), other=0.0)
    k_ptr += b64 * k_b + hk64 * k_h
    v_ptr += b64 * v_b + hk64 * v_h
    if MASK:
        # Plain numbers may be constants of 32 bits.
        col = tl.zeros([], tl.int64)
        if COL:
            col += tl.load(col_start) if COL_TENSOR else col_start
        first_row = tl.zeros([], tl.int64) + (tl.load(row_start) if ROW_TENSOR else row_start)
    if BIAS_ALIGNED:
        bias_b, bias_h = bias_b // 16 * 16, bias_h // 16 * 16
        bias_m, kv_len = bias_m // 16 * 16, kv_len // 16 * 16
    bias_rows = bias_ptr + b64 * bias_b + h.to(tl.int64) * bias_h
    bias_rows += _bias_rows(offs_m, bias_m, q_len, BIAS)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BDV], tl.float32)
    begin = split * keys_per_split
    end = tl.minimum(begin + keys_per_split, kv_len)
    if LISTED:
        tl.static_assert(BN == 64)
        end = begin
        inside = first_row < tile_rows * 64
        entry = table_ptr + (first_row >> 6) * 2
        count = tl.load(entry + 1, mask=inside, other=0)
        a = count * split // splits
        z = count * (split + 1) // splits
        steps_ptr += tl.load(entry, mask=inside, other=0).to(tl.int64) * 2
        words_ptr += (first_row & 63) * 2
        tile, low, high = _row_step(steps_ptr, words_ptr, a, z)
        column = tl.arange(0, 64)
        for i in tl.range(a, z, num_stages=STAGES):
            n = tile.to(tl.int64) * 64 - col + column
            keys_in = (n >= 0) & (n < kv_len)
            seen = ((tl.where(column < 32, low, high) >> (column & 31)) & 1) != 0
            seen = rows_in[:, None] & (seen & keys_in)[None, :]
            if VALID:
                w = tl.load(valid_ptr + b * valid_b + (n >> 5), mask=keys_in, other=0)
                seen = seen & (((w >> (n & 31).to(tl.int32)) & 1) != 0)[None, :]
            k = tl.load(k_ptr + n[None, :] * k_s + offs_d[:, None],
                        mask=keys_in[None, :] & (offs_d[:, None] < D), other=0.0)  # fmt: skip
            s = _dot(q, k, tl.zeros([ROWS, BN], tl.float32), INTERPRETED)
            x = _row_scores(s, bias_rows, n * bias_n, seen, scale, softcap, SOFTCAP, BIAS)
            v = tl.load(v_ptr + n[:, None] * v_s + offs_dv[None, :],
                        mask=keys_in[:, None] & (offs_dv[None, :] < DV), other=0.0)  # fmt: skip
            tile, low, high = _row_step(steps_ptr, words_ptr, i + 1, z)
            m, l, acc = _accumulate(x, v, m, l, acc, 1.0, INTERPRETED)
    elif MASK:
        row = first_row + offs_m
        table_rows = table_ptr + (row >> 6) * tile_cols
        if PATTERNS:
            pattern = tl.load(pattern_ptr + b * pattern_b + h * pattern_h, mask=rows_in, other=0)
            table_rows += pattern * tile_rows * tile_cols
        stored = rows_in & (row < tile_rows * 64)
        row_word = (row & 63) * 2
    for start in tl.range(begin, end, BN, num_stages=STAGES):
        n = start + tl.arange(0, BN)
        keys_in = tl.full([BN], True, tl.int1) if WHOLE else n < end
        seen = rows_in[:, None] & keys_in[None, :]
        if VALID:
            w = tl.load(valid_ptr + b * valid_b + (n >> 5), mask=keys_in, other=0)
            seen = seen & (((w >> (n & 31)) & 1) != 0)[None, :]
        if MASK and not LISTED:
            c = col + n
            inside = stored[:, None] & (c < tile_cols * 64)[None, :] & keys_in[None, :]
            tile = tl.load(table_rows[:, None] + (c >> 6)[None, :], mask=inside, other=-2)
            place = (
                words_ptr + tile.to(tl.int64) * 128 + row_word[:, None] + ((c >> 5) & 1)[None, :]
            )
            word = tl.load(place, mask=tile >= 0, other=0)
            bit = ((word >> (c & 31).to(tl.int32)[None, :]) & 1) != 0
            seen = seen & ((tile == -1) | bit)
        any_seen = True
        if MASK or VALID:
            any_seen = tl.max(seen.to(tl.int32)) > 0
        if any_seen:
            n64 = n.to(tl.int64)
            k = tl.load(k_ptr + n64[None, :] * k_s + offs_d[:, None],
                        mask=keys_in[None, :] & (offs_d[:, None] < D), other=0.0)  # fmt: skip
            s = _dot(q, k, tl.zeros([ROWS, BN], tl.float32), INTERPRETED)
            x = _row_scores(s, bias_rows, n64 * bias_n, seen, scale, softcap, SOFTCAP, BIAS)
            v = tl.load(v_ptr + n64[:, None] * v_s + offs_dv[None, :],
                        mask=keys_in[:, None] & (offs_dv[None, :] < DV), other=0.0)  # fmt: skip
            m, l, acc = _accumulate(x, v, m, l, acc, 1.0, INTERPRETED)
    if SPLIT:
        # Slots follow merge_kernel's layout: heads, then the splits of one block of rows.
        at = ((b64 * heads + h) * tl.cdiv(q_len, TAKE) + take) * splits + split
        row_at = at * TAKE + lane // GROUP
        tl.store(part_ptr + row_at[:, None] * BDV + offs_dv[None, :], acc, mask=rows_in[:, None])
        ml = part_ml_ptr + at * 2 * TAKE + lane // GROUP
        tl.store(ml, m, mask=rows_in)
        tl.store(ml + TAKE, l, mask=rows_in)
    else:
        sink = tl.zeros([ROWS], tl.float32)
        if SINKS:
            sink = tl.load(sinks_ptr + h, mask=rows_in, other=0.0).to(tl.float32)
        o, lse = _finish(acc, m, l, sink, SINKS)
        out_rows = (
            out_ptr + ((b64 * q_len + offs_m[:, None]) * heads + h[:, None]) * DV + offs_dv[None, :]
        )
        tl.store(
            out_rows,
            o.to(out_ptr.dtype.element_ty),
            mask=rows_in[:, None] & (offs_dv[None, :] < DV),
        )
        if LSE:
            tl.store(lse_ptr + (b64 * heads + h) * q_len + offs_m, lse, mask=rows_in)


@_jit
def row_merge_kernel(
    out_ptr, lse_ptr, part_ptr, part_ml_ptr, sinks_ptr, heads, q_len, splits,
    take, DV: tl.constexpr, BDV: tl.constexpr, BS: tl.constexpr, SINKS: tl.constexpr,
    LSE: tl.constexpr,
):  # fmt: skip
    """Combine the splits of one query row, all at once (a fixed tree of additions)."""
    i = tl.program_id(1)
    bh = tl.program_id(0).to(tl.int64)
    h = tl.program_id(0) % heads
    b = bh // heads
    offs_s = tl.arange(0, BS)
    offs_dv = tl.arange(0, BDV)
    inside = offs_s < splits
    at = (bh * tl.cdiv(q_len, take) + i // take) * splits + offs_s
    ml = part_ml_ptr + at * 2 * take + i % take
    m = tl.load(ml, mask=inside, other=float("-inf"))
    l = tl.load(ml + take, mask=inside, other=0.0)
    top = tl.max(m, 0)
    if SINKS:
        sink = tl.load(sinks_ptr + h).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    base = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(m - base)
    total = tl.sum(l * weight, 0)
    if SINKS:
        total += tl.exp2(sink - base)
    rows = part_ptr + (at * take + i % take)[:, None] * BDV + offs_dv[None, :]
    o = tl.sum(tl.load(rows, mask=inside[:, None], other=0.0) * weight[:, None], 0)
    o = o / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + ((b * q_len + i) * heads + h) * DV + offs_dv, o.to(out_ptr.dtype.element_ty),
             mask=offs_dv < DV)  # fmt: skip
    lse = tl.where(total > 0, top * LN2 + tl.log(total), float("-inf"))
    if LSE:
        tl.store(lse_ptr + bh * q_len + i, lse)
