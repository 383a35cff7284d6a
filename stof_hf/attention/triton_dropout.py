"""The bits of `dropout.py` in Triton, for tiles of 64 queries and 64 keys."""

import triton
import triton.language as tl

from . import dropout

_ROUNDS = tl.constexpr(dropout.ROUNDS)
_CALLS = tl.constexpr(dropout.BITS // 4)
_RANGE = tl.constexpr(1 << dropout.BITS)


@triton.jit
def _compare(kept, numbers, BIT: tl.constexpr):
    """One more bit, from the lowest on, of a comparison of 32 numbers with the threshold."""
    return kept & numbers if BIT else kept | numbers


@triton.jit
def _kept_words(seed, copy, q_tile, k_tile, THRESHOLD: tl.constexpr, INTERPRETED: tl.constexpr):
    """Of each of the tile's queries, the words of its first and its last 32 keys: int32 [64]."""
    row = (q_tile * 64 + tl.arange(0, 64))[:, None]
    word = (k_tile * 2 + tl.arange(0, 2))[None, :]
    kept = tl.full([64, 2], 0xFFFFFFFF, tl.uint32)
    for i in tl.static_range(_CALLS):
        a, b, c, d = tl.philox(seed, word, row, copy, i, _ROUNDS)
        kept = _compare(kept, a, THRESHOLD >> 4 * i & 1)
        kept = _compare(kept, b, THRESHOLD >> 4 * i + 1 & 1)
        kept = _compare(kept, c, THRESHOLD >> 4 * i + 2 & 1)
        kept = _compare(kept, d, THRESHOLD >> 4 * i + 3 & 1)
    kept = kept.to(tl.int32, bitcast=True)
    if not INTERPRETED:
        # A volatile move is made once: else each thread would compute all words that it needs.
        kept = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [kept], tl.int32, False, 1)
    return tl.split(kept)


@triton.jit
def kept_tile(
    seed, copy, q_tile, k_tile, KEYS: tl.constexpr, THRESHOLD: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Which elements of a tile of head b * H + h are kept: bool [64 queries, 64 keys].

    With KEYS transposed.
    """
    low, high = _kept_words(seed, copy, q_tile, k_tile, THRESHOLD, INTERPRETED)
    lane = tl.arange(0, 64)
    bit = tl.full([64], 1, tl.int32) << (lane & 31)
    if KEYS:
        word = tl.where(lane[:, None] < 32, low[None, :], high[None, :])
        return (word & bit[:, None]) != 0
    word = tl.where(lane[None, :] < 32, low[:, None], high[:, None])
    return (word & bit[None, :]) != 0


@triton.jit
def factor_of(THRESHOLD: tl.constexpr):
    """What the probabilities that are kept are multiplied by."""
    return _RANGE / (_RANGE - THRESHOLD)
