"""PyTorch's own attention where nothing is sparse: no mask, or a causal one."""

from __future__ import annotations

from typing import Any

import torch

from ..masks.patterns import Causal
from ..masks.sparse_mask import SparseMask
from . import calls, cuda_band, select
from .cuda_problem import aligned

_CAUSAL = Causal()


def prepare(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SparseMask,
    bias: torch.Tensor | None, sinks: torch.Tensor | None, scale: float, softcap: float,
    with_lse: bool,
) -> CudnnCall | None:  # fmt: skip
    """See `calls.forward`; None where a mask has to be applied, or where our kernel is ahead."""
    causal = (
        mask.pattern == _CAUSAL and q.shape[2] == k.shape[2] and mask.q_offset == mask.kv_offset
    )
    dense = (
        (causal or mask.pattern == calls.FULL_PATTERN)
        and not mask.is_view and mask.kv_valid is None
        and bias is None and sinks is None and softcap == 0
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[3] == v.shape[3] and q.shape[3] <= 128 and q.shape[3] % 8 == 0
        and aligned(q, k, v)
        and torch.backends.cuda.cudnn_sdp_enabled()
        and torch.cuda.get_device_capability(q.device)[0] >= 9
        and select.cudnn_is_ahead(q, k, mask, causal, _band(q, k, v, mask, scale))
    )  # fmt: skip
    return CudnnCall(scale, causal, with_lse) if dense else None


def _band(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SparseMask, scale: float
) -> tuple[int, int] | None:
    computes = cuda_band.computes(q, k, v, mask, None, scale, 0.0)
    return cuda_band.band_of(mask.pattern) if computes else None


class CudnnCall:
    """A call of cuDNN's attention, whose result lies in memory as the queries do."""

    def __init__(self, scale: float, causal: bool, with_lse: bool):
        self.scale, self.options = scale, (with_lse, 0.0, causal, False)
        self.run = torch.ops.aten._scaled_dot_product_cudnn_attention.default

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, *_ = self.run(q, k, v, None, *self.options, scale=self.scale)
        return out.transpose(1, 2), lse.view(q.shape[:3]) if self.options[0] else lse
