"""PyTorch's own attention for calls without a mask: nothing is sparse about them."""

from __future__ import annotations

from typing import Any

import torch

from ..masks.sparse_mask import SparseMask
from . import calls

#: From how many scores on cuDNN is ahead of the block-wise kernel, and, for head sizes up to 64, up
#: to how many blocks of 128 queries; measured on an H200.
_LEAST_SCORES, _MOST_BLOCKS = 12 << 20, 800


def prepare(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SparseMask,
    bias: torch.Tensor | None, sinks: torch.Tensor | None, scale: float, softcap: float,
) -> CudnnCall | None:  # fmt: skip
    """See `calls.forward`; None where a mask has to be applied, or where there is little to do."""
    blocks = q.shape[0] * q.shape[1] * -(-q.shape[2] // 128)
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    ahead = q.shape[2] >= 512 and scores >= _LEAST_SCORES
    ahead = ahead and (q.shape[3] > 64 or blocks <= _MOST_BLOCKS)
    dense = (
        mask.pattern == calls.FULL_PATTERN and not mask.is_view and mask.kv_valid is None
        and bias is None and sinks is None and softcap == 0 and ahead
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[3] == v.shape[3] and q.shape[3] <= 128 and q.shape[3] % 8 == 0
        and torch.backends.cuda.cudnn_sdp_enabled()
        and torch.cuda.get_device_capability(q.device)[0] >= 9
    )  # fmt: skip
    return CudnnCall(scale) if dense else None


class CudnnCall:
    """A call of cuDNN's attention, with the logarithms that the backward pass needs.

    Its result lies in memory as the queries do.
    """

    def __init__(self, scale: float):
        self.scale = scale
        self.run = torch.ops.aten._scaled_dot_product_cudnn_attention.default

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, *_ = self.run(q, k, v, None, True, 0.0, False, False, scale=self.scale)
        return out.transpose(1, 2), lse.view(q.shape[:3])
