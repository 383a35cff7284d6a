"""The attention function "paged|stof": continuous batching before Transformers 5.23.

A step packs the new tokens of all requests into one row; the cache gives back all keys of each
request, request after request. Cumulative lengths say where each begins.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..attention.op import attention_by_rows
from ..errors import UnsupportedError
from ..masks.sparse_mask import SparseMask
from ..masks.traced import structure_of


def paged_mask(*args: Any, **kwargs: Any) -> None:
    """No mask: the attention function makes it from the cumulative lengths."""


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    cache: Any = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | dict[str, torch.Tensor] | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of packed requests over a paged cache.

    Args:
        query, key, value: [1, H or Hkv, tokens, D], the new tokens.
        cache: the PagedAttentionCache. cu_seq_lens_q, cu_seq_lens_k: int32 [requests + 1].
        Other arguments as for `stof_attention`.

    Raises UnsupportedError without a paged cache, and for patterns set on the layer.
    """
    if cache is None or cu_seq_lens_q is None or cu_seq_lens_k is None:
        raise UnsupportedError(
            'attn_implementation="paged|stof" is for continuous batching, which gives a paged '
            'cache: use "stof"'
        )
    if module.__dict__.get("_stof_stamp") is not None:
        raise UnsupportedError(
            "continuous batching knows no positions for patterns: use model.generate, or remove "
            "the pattern "
            "with stof_hf.set_pattern(model, None)"
        )
    window = sliding_window or getattr(module, "sliding_window", None) or None
    if isinstance(cu_seq_lens_k, dict):
        cu_seq_lens_k = cu_seq_lens_k["sliding_attention" if window else "full_attention"]
    key, value = cache.update(
        key_states=key,
        value_states=value,
        layer_idx=module.layer_idx,
        read_index=kwargs["read_index"],
        write_index=kwargs["write_index"],
    )
    key, value = key.transpose(0, 1).unsqueeze(0), value.transpose(0, 1).unsqueeze(0)
    allowed = _allowed(cu_seq_lens_q, cu_seq_lens_k, query.shape[2], key.shape[2], window)
    mask = SparseMask(query.shape[2], key.shape[2], *structure_of(allowed))
    out = attention_by_rows(
        query, key, value, mask, scaling, softcap=softcap or 0.0, bias=None, sinks=s_aux
    )
    return out, None


def _allowed(
    cu_q: torch.Tensor, cu_k: torch.Tensor, q_len: int, kv_len: int, window: int | None
) -> torch.Tensor:
    """bool [1, 1, Sq, Sk]: same request, and causal with the last query at the last key."""
    cu_q, cu_k = cu_q.long(), cu_k.long()
    last = len(cu_q) - 2
    q, k = torch.arange(q_len, device=cu_q.device), torch.arange(kv_len, device=cu_q.device)
    of_q = (torch.searchsorted(cu_q, q, right=True) - 1).clamp(max=last)[:, None]
    of_k = (torch.searchsorted(cu_k, k, right=True) - 1).clamp(max=last)
    ahead = cu_q[of_q + 1] - q[:, None]
    behind = cu_k[of_k + 1] - k
    allowed = (of_q == of_k) & (behind >= ahead) & (ahead > 0) & (behind > 0)
    if window is not None:
        allowed &= behind < ahead + window
    return allowed[None, None]
