"""From whatever stands for a mask at an attention layer to what the op takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import MaskError, UnsupportedError, warn_once
from ..masks.build import build_additive
from ..masks.cache import mask_for
from ..masks.pattern import Pattern
from ..masks.patterns import Causal, Documents, Full
from ..masks.sparse_mask import SparseMask
from ..masks.traced import TracedMask, both, text_of
from .combine import derived_of, require_position, require_positions, with_pattern
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
        if stamp is not None and not stamp.cross and query.shape[2] != key.shape[2]:
            raise _no_positions(module, query, key)
        if additive is not None:
            bias = additive if bias is None else bias + additive
    if mask is not None and mask.shape[2] == 1 < query.shape[2]:
        mask = _for_all_queries(mask, query.shape[2])
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

    None is causal where the call says so, else it is all keys, as in eager attention. Transformers'
    `sdpa_attention_forward` asks the layer, of which encoders', too, may say is_causal or nothing.
    """
    q_len, kv_len = query.shape[2], key.shape[2]
    said = is_causal
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = q_len > 1 and bool(said)
    if cu_seq_lens_q is not None and q_len > 1:
        # Eager attention knows no packed documents; FlashAttention reads the layer.
        causal = getattr(module, "is_causal", False) if said is None else causal
        base = _packed(cu_seq_lens_q, cu_seq_lens_k, q_len, kv_len)
        base = base & _CAUSAL if causal else base
        return _direct(base if stamp is None else base & stamp.pattern, query, key), None
    if said is None and is_causal and q_len > 1:
        _warn_of_all_keys(type(module))
    if stamp is None and not causal:
        return None, None
    keep = None
    q_offset = 0
    if causal and kv_len > q_len:
        kv_len = keep = q_len
    elif q_len != kv_len and stamp is not None:
        if stamp.cross:
            require_position(q_len)
        elif q_len == 1 and is_causal:
            q_offset = kv_len - 1
        else:
            raise _no_positions(module, query, key)
    pattern = _CAUSAL if stamp is None else stamp.causal if causal else stamp.pattern
    if stamp is not None:
        require_positions(stamp.pattern, max(q_offset + q_len, kv_len))
    if torch.compiler.is_compiling():
        text = CAUSAL_TEXT if stamp is None else stamp.required_text()
        text = both(CAUSAL_TEXT, text) if causal and stamp is not None else text
        return TracedMask((1, 1, q_len, kv_len), text, q_offset=q_offset), keep
    return mask_for(pattern, q_len, kv_len, q_offset, device=query.device), keep


def _no_positions(module: nn.Module, query: torch.Tensor, key: torch.Tensor) -> UnsupportedError:
    return UnsupportedError(
        f"the pattern on {type(module).__name__} needs the positions of its {query.shape[2]} "
        f"queries among {key.shape[2]} keys, and the model gives none: leave this module out with "
        "set_pattern(..., modules=...)"
    )


CAUSAL_TEXT, FULL_TEXT = text_of(_CAUSAL), text_of(_FULL)


@torch.compiler.assume_constant_result
def _warn_of_all_keys(cls: type) -> None:
    """Warn once for a class that is not Transformers' own, whose eager attention is known."""
    if cls.__module__.startswith("transformers."):
        return
    warn_once(
        f"{cls.__name__} gives attention neither a mask nor is_causal, and every query sees all "
        "keys, as in eager attention; sdpa takes this for causal. If it is, pass is_causal=True to "
        "the attention function; if not, set is_causal = False on the layer",
        stacklevel=2,
    )


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
        return converted(mask, _dense)
    if type(mask).__name__ == "BlockMask":
        return converted(mask, lambda m: (SparseMask.from_block_mask(m), None))
    raise MaskError(
        f"{type(mask).__name__} is no mask: give a SparseMask, a Pattern, a BlockMask, or a bool "
        "or float tensor"
    )


def converted(mask: Any, convert: Any) -> Any:
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


def _for_all_queries(mask: SparseMask | TracedMask, q_len: int) -> SparseMask | TracedMask:
    """A mask of one query, if it is padding or was a tensor, for `q_len`: tensors broadcast so."""
    if isinstance(mask, TracedMask):
        if mask.pattern not in (None, FULL_TEXT):
            return mask
        allowed = None if mask.allowed is None else mask.allowed.expand(-1, -1, q_len, -1)
        shape = (*mask.shape[:2], q_len, mask.shape[3])
        return TracedMask(shape, mask.pattern, allowed, mask.kv_valid)
    if mask.pattern not in (None, _FULL):
        return mask
    derived = derived_of(mask)
    if q_len not in derived:
        every = mask_for(_FULL, q_len, mask.kv_len, device=mask.device)
        if mask.pattern is not None:
            derived[q_len] = every.with_words(mask.kv_valid)
        elif (row := mask.to_dense()).shape[1] == 1:
            derived[q_len] = every.with_padding(row[:, 0, 0])
        else:
            derived[q_len] = SparseMask.from_dense(row.expand(-1, -1, q_len, -1))
    return derived[q_len]


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

    return converted(cu_q, documents)


def _direct(pattern: Pattern, query: torch.Tensor, key: torch.Tensor) -> SparseMask:
    return mask_for(pattern, query.shape[2], key.shape[2], device=query.device)
