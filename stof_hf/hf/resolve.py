"""From whatever stands for a mask at an attention layer to what the op takes."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import MaskError, UnsupportedError
from ..masks.bits import TILE
from ..masks.build import build_additive
from ..masks.cache import mask_for
from ..masks.convert import mask_function
from ..masks.pattern import And, Not, Or, Pattern
from ..masks.patterns import BlockTable, Causal, Custom, Dense, Documents, Full
from ..masks.sparse_mask import SparseMask
from ..masks.traced import TracedMask, both, structure_of
from .patching import Stamp

_FULL, _CAUSAL = Full(), Causal()


def resolve_mask(
    module: nn.Module,
    stamp: Stamp | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    is_causal: bool | None,
    bias: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None,
    cu_seq_lens_k: torch.Tensor | None,
) -> tuple[Any, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """(mask, bias, key, value) for the op, with the layer's own pattern applied.

    See `stof_attention` for the arguments. An additive mask becomes part of the bias; keys and
    values are cut where a static cache is longer than what causal attention can see.
    """
    if mask is None:
        mask, q_len = _default_mask(
            module, stamp, query, key, is_causal, cu_seq_lens_q, cu_seq_lens_k
        )
        if q_len is not None and q_len < key.shape[2]:
            key, value = key[:, :, :q_len], value[:, :, :q_len]
            bias = bias[..., :q_len] if bias is not None and bias.shape[-1] > q_len else bias
        return mask, bias, key, value
    if not isinstance(mask, (SparseMask, TracedMask)):
        mask, additive = _given(mask, query, key)
        if additive is not None:
            bias = additive if bias is None else bias + additive
    if isinstance(mask, SparseMask) and mask.device != query.device:
        mask = mask.to(query.device)
    if stamp is not None and mask is not None:
        mask = with_pattern(mask, stamp)
    elif stamp is not None:
        mask, _ = _default_mask(module, stamp, query, key, False, None, None)
    return mask, bias, key, value


def _default_mask(
    module: nn.Module,
    stamp: Stamp | None,
    query: torch.Tensor,
    key: torch.Tensor,
    is_causal: bool | None,
    cu_seq_lens_q: torch.Tensor | None,
    cu_seq_lens_k: torch.Tensor | None,
) -> tuple[Any, int | None]:
    """The mask that None stands for, and the number of keys to keep if that is fewer than all.

    The rules are those of Transformers' `sdpa_attention_forward`.
    """
    q_len, kv_len = query.shape[2], key.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = q_len > 1 and is_causal
    if cu_seq_lens_q is not None and q_len > 1:
        base = _packed(cu_seq_lens_q, cu_seq_lens_k, q_len, kv_len)
        base = base & _CAUSAL if causal else base
        return _direct(base if stamp is None else base & stamp.pattern, query, key), None
    if stamp is None and not causal:
        return None, None
    keep = None
    q_offset = 0
    if causal and kv_len > q_len:
        kv_len = keep = q_len
    elif q_len != kv_len and stamp is not None:
        if stamp.cross:
            _require_position(q_len)
        elif q_len == 1 and is_causal:
            q_offset = kv_len - 1
        else:
            raise UnsupportedError(
                f"the pattern on {type(module).__name__} needs the positions of its {q_len} "
                f"queries among {kv_len} keys, and the model gives none: leave this module out "
                "with set_pattern(..., modules=...)"
            )
    pattern = _CAUSAL if stamp is None else stamp.causal if causal else stamp.pattern
    if stamp is not None:
        require_positions(stamp.pattern, max(q_offset + q_len, kv_len))
    if torch.compiler.is_compiling():
        text = CAUSAL_TEXT if stamp is None else stamp.required_text()
        text = both(CAUSAL_TEXT, text) if causal and stamp is not None else text
        return TracedMask((1, 1, q_len, kv_len), text, q_offset=q_offset), keep
    return mask_for(pattern, q_len, kv_len, q_offset, device=query.device), keep


CAUSAL_TEXT = '{"type": "Causal"}'

# What masks given as tensors and BlockMasks were converted to, as long as they live.
_converted: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _given(mask: Any, query: torch.Tensor, key: torch.Tensor) -> tuple[Any, torch.Tensor | None]:
    """(mask, additive bias) of a mask that is neither made by this package nor None."""
    q_len, kv_len = query.shape[2], key.shape[2]
    if isinstance(mask, Pattern):
        if q_len != kv_len:
            raise MaskError(
                f"a pattern was given for {q_len} queries and {kv_len} keys, whose positions are "
                "not known: give SparseMask.from_pattern(pattern, q_len, kv_len, q_offset=...)"
            )
        return _direct(mask, query, key), None
    if isinstance(mask, torch.Tensor):
        if mask.ndim != 4:
            raise MaskError(
                "expected a mask [batch, heads, queries, keys] at the attention layer, not "
                f"{list(mask.shape)}"
            )
        if torch.compiler.is_compiling():
            return _dense_in_graph(mask)
        return _cached(mask, _dense)
    if type(mask).__name__ == "BlockMask":
        return _cached(mask, lambda m: (SparseMask.from_block_mask(m), None))
    raise MaskError(
        f"{type(mask).__name__} is no mask: give a SparseMask, a Pattern, a BlockMask, or a bool "
        "or float tensor"
    )


def _cached(mask: Any, convert: Any) -> Any:
    """`convert(mask)`, once for a mask's identity and version."""
    version = None
    if isinstance(mask, torch.Tensor):
        if mask.requires_grad or mask.is_inference():
            # Inference tensors count no versions, so a change in place would go unnoticed.
            return convert(mask)
        version = mask._version
    entry = _converted.get(mask)
    if entry is None or entry[0] != version:
        entry = (version, convert(mask))
        _converted[mask] = entry
    return entry[1]


def _dense(mask: torch.Tensor) -> tuple[SparseMask | None, torch.Tensor | None]:
    """Reads the mask, also to see whether an additive one only allows and forbids."""
    for dim in (0, 1):
        if mask.shape[dim] > 1 and mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    if mask.dtype == torch.bool:
        return SparseMask.from_dense(mask), None
    if not mask.is_floating_point():
        raise MaskError(f"a mask tensor must be bool or floating point, not {mask.dtype}")
    held, plain = build_additive(mask.detach())
    if plain and not mask.requires_grad:
        if held is None:
            held = mask_for(_FULL, *mask.shape[-2:], device=mask.device)
        return held, None
    return held, mask.masked_fill(mask.detach() <= torch.finfo(mask.dtype).min / 2, 0)


def _dense_in_graph(mask: torch.Tensor) -> tuple[TracedMask, torch.Tensor | None]:
    if mask.dtype == torch.bool:
        return TracedMask(tuple(mask.shape), None, mask), None
    forbidden = mask.detach() <= torch.finfo(mask.dtype).min / 2
    return TracedMask(tuple(mask.shape), None, ~forbidden), mask.masked_fill(forbidden, 0)


def _packed(cu_q: torch.Tensor, cu_k: torch.Tensor | None, q_len: int, kv_len: int) -> Pattern:
    """Documents by cumulative lengths, which are read once for a tensor's identity and version."""
    if q_len != kv_len or (cu_k is not None and cu_k is not cu_q and not torch.equal(cu_q, cu_k)):
        raise UnsupportedError(
            "packed documents (cu_seq_lens_q, cu_seq_lens_k) must have as many keys as queries: "
            "leave both "
            "out and give position_ids or an attention mask instead"
        )

    def documents(cu: torch.Tensor) -> Documents:
        positions = torch.arange(q_len)
        return Documents(torch.searchsorted(cu.to("cpu", torch.int64), positions, right=True))

    return _cached(cu_q, documents)


def _direct(pattern: Pattern, query: torch.Tensor, key: torch.Tensor) -> SparseMask:
    return mask_for(pattern, query.shape[2], key.shape[2], device=query.device)


def with_pattern(mask: SparseMask | TracedMask, stamp: Stamp) -> SparseMask | TracedMask:
    """`mask` where the stamped pattern allows it as well; the padding stays."""
    if stamp.cross:
        _require_position(mask.shape[2])
    if isinstance(mask, TracedMask):
        return _traced_with_pattern(mask, stamp)
    return derive(mask, stamp.pattern, stamp.key)


def _require_position(q_len: int) -> None:
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
    derived = getattr(mask, "_derived", None)
    if derived is None:
        derived = {}
        object.__setattr__(mask, "_derived", derived)
    if key not in derived:
        derived[key] = _combined(mask, pattern)
    return derived[key]


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
            shape = pattern.mask.shape[-2:] if dense else (len(pattern.ids[0]),)
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
