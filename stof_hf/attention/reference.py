"""The oracle: attention in the plainest way, in fp64 (or fp32), with a dense mask."""

from __future__ import annotations

import torch


def reference_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    factors: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with S x S scores in memory, differentiable: what every backend is compared with.

    Args:
        q: [B, H, Sq, D]; k: [B, Hkv, Sk, D]; v: [B, Hkv, Sk, Dv].
        mask: bool, broadcastable to [B, H, Sq, Sk], True where attention is allowed; None for all.
        scale: 1 / sqrt(D) by default.
        softcap, bias, sinks: see `stof_hf.attention`.
        factors: of dropout, [B, H, Sq, Sk]: what the softmax's probabilities are multiplied by.
        dtype: in which it computes.

    Returns:
        (out [B, H, Sq, Dv], lse [B, H, Sq]), both in `dtype`. A row with no allowed key is zero.
    """
    group = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.to(dtype) for x in (q, k, v))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = scale * (q @ k.transpose(-1, -2))
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(dtype)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    logits = scores
    if sinks is not None:
        column = sinks.to(dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        logits = torch.cat([scores, column], -1)
    lse = torch.logsumexp(logits, -1)
    # exp(-inf - (-inf)) would be NaN, in the gradient too: an empty row takes any finite maximum.
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    weights = torch.exp(scores - finite[..., None])
    if factors is not None:
        weights = weights * factors
    return weights @ v, lse
