"""A layer's pattern on top of a mask: their conjunction, made once for a mask."""

from __future__ import annotations

from functools import lru_cache

import torch

from ..errors import MaskError, UnsupportedError
from ..masks.bits import TILE
from ..masks.cache import mask_for
from ..masks.convert import mask_function
from ..masks.pattern import And, Not, Or, Pattern
from ..masks.patterns import BlockTable, Custom, Dense, Documents
from ..masks.sparse_mask import SparseMask
from ..masks.traced import TracedMask, both, structure_of
from .patching import Stamp


def with_pattern(mask: SparseMask | TracedMask, stamp: Stamp) -> SparseMask | TracedMask:
    """`mask` where the stamped pattern allows it as well; the padding stays."""
    if stamp.cross:
        require_position(mask.shape[2])
    if isinstance(mask, TracedMask):
        return _traced_with_pattern(mask, stamp)
    return derive(mask, stamp.pattern, stamp.key)


def require_position(q_len: int) -> None:
    """Raise UnsupportedError for a single query of cross-attention."""
    if q_len == 1:
        raise UnsupportedError(
            "a pattern on cross-attention needs the query's position, which Transformers does not "
            "give where tokens are generated one by one: remove it with "
            "stof_hf.set_pattern(model, None)"
        )


def derive(mask: SparseMask, pattern: Pattern, key: str) -> SparseMask:
    """`mask` & `pattern`, once for a mask: all layers of a forward share it.

    A compiled graph only finds what was derived before (see `stof_mask`).
    """
    derived = derived_of(mask)
    if key not in derived:
        derived[key] = _combined(mask, pattern)
    return derived[key]


def derived_of(mask: SparseMask) -> dict[str | int, SparseMask]:
    """What was made of a mask: by the key of a pattern, by a number of queries."""
    derived = getattr(mask, "_derived", None)
    if derived is None:
        derived = {}
        object.__setattr__(mask, "_derived", derived)
    return derived


def _combined(mask: SparseMask, extra: Pattern) -> SparseMask:
    q_len, kv_len, device = mask.q_len, mask.kv_len, mask.device
    lasting = mask.pattern is not None and _by_content(mask.pattern) and _by_content(extra)
    if lasting and mask.is_view and extra.length_free:
        positions = (mask.row_ptr.shape[1] - 1) * TILE
        storage = mask_for(_conjunction(mask.pattern, extra), positions, positions, device=device)
        out = storage.rows(mask.row_start, q_len, kv_len, col_start=mask.col_start)
        return out.with_words(mask.kv_valid)
    q_offset, kv_offset = mask.q_offset + mask.row_start, mask.kv_offset + mask.col_start
    own = mask.pattern
    if own is None and mask.is_known:
        sizes = (n if n > 1 else None for n in mask.pattern_id.shape)
        own = Custom(mask_function(mask.with_words(None)), *sizes)
    if own is None:
        bare = mask.with_words(None).to_dense()
        allowed = bare & _values(extra, bare.shape, q_offset, kv_offset, device)
        return SparseMask(q_len, kv_len, *structure_of(allowed), kv_valid=mask.kv_valid)
    q_offset, kv_offset = int(q_offset), int(kv_offset)
    require_positions(extra, max(q_offset + q_len, kv_offset + kv_len if q_len > 1 else 0))
    if lasting:
        pattern = _conjunction(mask.pattern, extra)
        out = mask_for(pattern, q_len, kv_len, q_offset, kv_offset, device=device)
    else:
        pattern = own & extra
        out = SparseMask.from_pattern(
            pattern, q_len, kv_len, q_offset=q_offset, kv_offset=kv_offset, device=device
        )
    return out.with_words(mask.kv_valid)


def require_positions(pattern: Pattern, count: int) -> None:
    """Raise MaskError where a pattern made from a tensor is shorter than the sequence."""
    if isinstance(pattern, (And, Or)):
        for part in pattern.patterns:
            require_positions(part, count)
    elif isinstance(pattern, Not):
        require_positions(pattern.pattern, count)
    elif isinstance(pattern, (BlockTable, Dense, Documents)):
        if isinstance(pattern, BlockTable):
            shape = [n * pattern.block_size for n in pattern.table.shape[1:]]
        else:
            dense = isinstance(pattern, Dense)
            shape = pattern.mask.shape[-2:] if dense else pattern.table.shape[1:]
        if min(shape) < count:
            raise MaskError(
                f"the pattern {type(pattern).__name__} is for {min(shape)} positions, the sequence "
                f"has {count}: set one that covers the whole sequence"
            )


@lru_cache(maxsize=64)
def _conjunction(a: Pattern, b: Pattern) -> Pattern:
    return a & b


def _values(
    pattern: Pattern,
    shape: torch.Size,
    q_offset: int | torch.Tensor,
    kv_offset: int | torch.Tensor,
    device: torch.device,
) -> torch.Tensor:
    """The pattern as a dense tensor for a mask of the given shape [B, 1 or H, Sq, Sk]."""
    batch = torch.arange(shape[0], device=device)[:, None, None, None]
    head = torch.arange(pattern.heads or 1, device=device)[:, None, None]
    q = torch.arange(shape[2], device=device)[:, None] + q_offset
    k = torch.arange(shape[3], device=device) + kv_offset
    # As builders do: random blocks depend on the number of positions, not of keys at hand.
    bound = pattern if pattern.length_free else pattern.bind(int(kv_offset) + shape[3])
    return bound(batch, head, q, k)


def _by_content(pattern: Pattern) -> bool:
    """Whether a pattern's fingerprint is cheap and lasting, so that its masks are worth keeping."""
    if isinstance(pattern, (And, Or)):
        return all(_by_content(p) for p in pattern.patterns)
    if isinstance(pattern, Not):
        return _by_content(pattern.pattern)
    return not isinstance(pattern, (Documents, Custom, Dense)) and pattern.serializable


def _traced_with_pattern(mask: TracedMask, stamp: Stamp) -> TracedMask:
    place = (mask.kv_valid, mask.q_offset, mask.kv_offset)
    if mask.allowed is None:
        return TracedMask(mask.shape, both(mask.pattern, stamp.required_text()), None, *place)
    device = mask.allowed.device
    allowed = mask.allowed & _values(
        stamp.pattern, mask.shape, mask.q_offset, mask.kv_offset, device
    )
    return TracedMask(mask.shape, None, allowed, *place)
