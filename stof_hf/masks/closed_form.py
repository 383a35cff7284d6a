"""Masks of closed-form patterns, built by the host library (csrc/masks).

The pattern travels as a list of numbers, which program.h explains: leaves, and behind those that it
combines each `&`, `|` and `~`. Patterns that a caller gave element by element, or made a class of
their own, have no such list; `build.py` evaluates them tile by tile.
"""

from __future__ import annotations

import ctypes
import struct
import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from ..errors import BuildError, StofWarning
from . import bits, native, patterns
from .bits import TILE
from .device import upload
from .pattern import Pattern
from .sparse_mask import PLANS, SparseMask

_FULL, _BAND, _DILATED, _CHUNKS, _KEYS, _QUERIES, _DOCUMENTS, _RANDOM, _AND, _OR, _NOT = range(11)
# Farther than any position, and so that sums stay below 2^63.
_FAR = 1 << 40


def _near(x: int) -> int:
    return min(x, _FAR)


def _dilated(p: Any) -> list[int]:
    reach = _near(p.window * p.dilation)
    return [_BAND, -reach, reach] if p.dilation == 1 else [_DILATED, reach, _near(p.dilation)]


def _ranges(ranges: Iterable[tuple[int, int]]) -> list[int]:
    near = [_near(x) for pair in ranges for x in pair]
    return [len(near) // 2, *near]


def _global_tokens(p: Any) -> list[int]:
    ranges = _ranges(p.ranges)
    return [_KEYS, *ranges, _QUERIES, *ranges, _OR, 2]


def _documents(p: Any) -> list[int]:
    ids = p.table
    return [_DOCUMENTS, ids.data_ptr(), *ids.shape]


def _random_blocks(p: Any) -> list[int] | None:
    if p.seed >> 63:
        return None
    fill, of = int(p.fill * (1 << 24)), 0 if p.causal else p.key_blocks
    return [_RANDOM, p.blocks, _near(p.block_size), p.seed, fill, of]


def _combined(operation: int) -> Callable[[Any], list[int] | None]:
    def code(p: Any) -> list[int] | None:
        out: list[int] = []
        for part in p.patterns:
            one = program(part)
            if one is None:
                return None
            out += one
        return [*out, operation, len(p.patterns)]

    return code


def _not(p: Any) -> list[int] | None:
    of = program(p.pattern)
    return None if of is None else [*of, _NOT]


# By the very class: what a subclass changes is not known here.
_CODES: dict[type, Callable[[Any], list[int] | None]] = {
    patterns.Full: lambda p: [_FULL],
    patterns.Causal: lambda p: [_BAND, -_FAR, 0],
    patterns.SlidingWindow: lambda p: [_BAND, -_near(p.left), _near(p.right)],
    patterns.Dilated: _dilated,
    patterns.Chunked: lambda p: [_CHUNKS, _near(p.size)],
    patterns.PrefixLM: lambda p: [_BAND, -_FAR, 0, _KEYS, *_ranges([(0, p.prefix)]), _OR, 2],
    patterns.GlobalKeys: lambda p: [_KEYS, *_ranges(p.ranges)],
    patterns.GlobalTokens: _global_tokens,
    patterns.Longformer: lambda p: program(p.composed),
    patterns.BigBird: lambda p: program(p.composed),
    patterns.Documents: _documents,
    patterns.RandomBlocks: _random_blocks,
    patterns.And: _combined(_AND),
    patterns.Or: _combined(_OR),
    patterns.Not: _not,
}


def program(pattern: Pattern) -> list[int] | None:
    """The pattern, bound to a length, as numbers; None where it has no such form."""
    code = _CODES.get(type(pattern))
    return None if code is None else code(pattern)


@lru_cache(1)
def _library() -> ctypes.CDLL | None:
    """The host library, or None, with one warning, where it does not build."""
    try:
        return native.library()
    except BuildError as error:
        warnings.warn(
            f"stof_hf: masks are built by numpy, which takes milliseconds longer ({error})",
            StofWarning,
            stacklevel=2,
        )
        return None


def build(
    pattern: Pattern,
    bound: Pattern,
    q_len: int,
    kv_len: int,
    q_offset: int,
    kv_offset: int,
    device: torch.device,
) -> SparseMask | None:
    """The mask of `pattern`, which is `bound` to so many keys; None where numpy has to build it."""
    code = program(bound)
    counted = max(q_len, kv_len) < 1 << 31 and max(q_offset + q_len, kv_offset + kv_len) <= _FAR
    if code is None or not counted:
        return None
    library = _library()
    if library is None:
        return None
    batch = bound.batch or 1
    request = struct.pack(
        f"{9 + len(code)}q",
        batch, q_len, kv_len, q_offset, kv_offset, *native.threads(), len(code), *code,
    )  # fmt: skip
    info = (ctypes.c_int64 * 11)()
    made = library.stof_mask(request, info)
    distinct, runs, tiles, blocks, ids, ptr, col, length, content, words, size = info
    host = native.take(made, size, torch.device("cpu"))
    stored = upload(host, device)
    part, known, width = stored.as_strided, host.numpy(), bits.words_per(q_len) + 1
    plans = {
        "host_runs": (
            known[ptr : ptr + distinct * width].reshape(distinct, width),
            known[col : col + runs],
            known[length : length + runs],
            known[content : content + runs],
        ),
        "host_words": known[words:].view(np.uint64).reshape(tiles, TILE),
        "valid_share": blocks / (batch * -(-q_len // 16) * -(-kv_len // 16)),
    }
    mask = SparseMask(
        q_len,
        kv_len,
        pattern_id=part((batch, 1), (1, 1), ids),
        row_ptr=part((distinct, width), (width, 1), ptr),
        run_col=part((runs,), (1,), col),
        run_len=part((runs,), (1,), length),
        run_bits=part((runs,), (1,), content),
        tile_bits=stored.view(torch.int64).as_strided((tiles, TILE), (TILE, 1), words // 2),
        q_offset=q_offset,
        kv_offset=kv_offset,
        pattern=pattern,
        plans=plans,
    )
    PLANS[mask.tile_bits] = plans
    return mask
