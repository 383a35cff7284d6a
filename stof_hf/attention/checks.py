"""What no backend computes is refused here, with an error that names the way out."""

from __future__ import annotations

import torch

from ..errors import MaskError, UnsupportedError
from ..masks.sparse_mask import SparseMask
from .relative import Bias

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: SparseMask | None,
    bias: Bias | None,
    sinks: torch.Tensor | None,
) -> None:
    """Raise for what no backend computes; cheap, reads no device memory."""
    if not q.dtype == k.dtype == v.dtype:
        raise UnsupportedError(
            f"query, key and value have dtypes {q.dtype}, {k.dtype} and {v.dtype}: give them one "
            "dtype, or run under torch.autocast, which casts them"
        )
    if q.dtype not in DTYPES:
        raise UnsupportedError(
            f"dtype {q.dtype} is not supported: use float16, bfloat16 or float32 (model.to(dtype))"
        )
    device = q.device
    if k.device != device or v.device != device:
        raise UnsupportedError(
            f"query, key and value are on {device}, {k.device} and {v.device}: move them to one "
            "device"
        )
    batch, heads, q_len, dim = q.shape if q.ndim == 4 else (0, 0, 0, 0)
    if (
        q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3]
        or k.shape[0] != batch or k.shape[3] != dim or heads % k.shape[1]
    ):  # fmt: skip
        raise UnsupportedError(
            f"shapes do not fit: query {list(q.shape)}, key {list(k.shape)}, value {list(v.shape)}"
            "; expected [B, H, Sq, D], [B, Hkv, Sk, D] and [B, Hkv, Sk, Dv] with H a multiple of "
            "Hkv"
        )
    if dim > MAX_HEAD_DIM or v.shape[3] > MAX_HEAD_DIM:
        raise UnsupportedError(
            f"head size {max(dim, v.shape[3])} is not supported, the largest is {MAX_HEAD_DIM}: "
            'use attn_implementation="sdpa" for this model'
        )
    if mask is not None:
        _check_mask(mask, batch, heads, q_len, k.shape[2], device)
    if sinks is not None and sinks.shape != (heads,):
        raise UnsupportedError(f"sinks must be [{heads}], one a head, not {list(sinks.shape)}")
    if bias is not None:
        target = (batch, heads, q_len, k.shape[2])
        if bias.ndim > 4 or any(
            n not in (1, t) for n, t in zip(bias.shape[::-1], target[::-1], strict=False)
        ):
            raise UnsupportedError(f"bias {list(bias.shape)} does not broadcast to {list(target)}")


def _check_mask(
    mask: SparseMask, batch: int, heads: int, q_len: int, kv_len: int, device: torch.device
) -> None:
    mask_batch, mask_heads = mask.pattern_id.shape
    if mask.q_len != q_len or mask.kv_len != kv_len:
        raise MaskError(
            f"the mask is for {mask.q_len} queries and {mask.kv_len} keys, the tensors hold "
            f"{q_len} and {kv_len}: build it with from_pattern(pattern, {q_len}, {kv_len})"
        )
    valid = mask.kv_valid
    if (
        mask_batch not in (1, batch) or mask_heads not in (1, heads)
        or (valid is not None and valid.shape[0] not in (1, batch))
    ):  # fmt: skip
        raise MaskError(
            f"the mask is for batch {mask.shape[0]} and {mask_heads} heads, the tensors hold "
            f"{batch} and {heads}: a mask's batch and heads are 1 or those of the query"
        )
    if mask.device != device:
        raise MaskError(
            f"the mask is on {mask.device}, the tensors on {device}: mask.to({str(device)!r})"
        )
