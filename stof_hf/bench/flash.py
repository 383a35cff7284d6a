"""FlashAttention-4 for a step with a static cache, as Transformers' implementation "bench_fa4".

Transformers' own cuts the cache by the shape of a padding mask, and a CUDA graph replays that cut.
Here the mask function says on the device how many keys there are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from .contestants import first_result

__all__ = ["NAME"]

#: Without the word "flash", by which Transformers would take it for its own.
NAME = "bench_fa4"


@torch.library.custom_op(
    "stof_bench::fa4",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor used, float scale, int? window) -> Tensor",
)
def _fa4(q, k, v, used, scale, window):
    from flash_attn.cute.interface import flash_attn_varlen_func

    # One split: before Blackwell it takes no more, whatever its heuristic would choose.
    rows = (x.transpose(1, 2) for x in (q, k, v))
    bounds = (None, None) if window is None else (window - 1, 0)
    return first_result(
        flash_attn_varlen_func(*rows, seqused_k=used, softmax_scale=scale, window_size=bounds)
    )


@_fa4.register_fake
def _(q, k, v, used, scale, window):
    batch, heads, q_len, _ = q.shape
    return q.new_empty(batch, q_len, heads, v.shape[-1])


def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    used: torch.Tensor, *, scaling: float, sliding_window: int | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """[B, 1, H, D] of a query [B, H, 1, D], whose own key is the last of those `used`."""
    return torch.ops.stof_bench.fa4(query, key, value, used, scaling, sliding_window), None


def _used(
    *, batch_size: int, q_length: int, kv_length: int, q_offset: int | torch.Tensor,
    device: torch.device, **kwargs: Any,
) -> torch.Tensor:  # fmt: skip
    """How many keys of the cache each sequence has after this step, int32 [B]."""
    seen = q_offset + q_length
    if not isinstance(seen, torch.Tensor):  # of a layer that holds its window alone
        seen = torch.full((), seen, device=device)
    return seen.clamp(max=kv_length).to(torch.int32).repeat(batch_size)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _used)
