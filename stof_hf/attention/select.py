"""Which kernel computes a call: backend, and row-wise or block-wise."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..errors import UnsupportedError
from ..masks.sparse_mask import SparseMask

#: A view with at most this many queries is decoding: row-wise whatever the mask.
DECODE_ROWS = 16


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SparseMask | None, **rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the backend of the tensors' device; see `attention.op` for the arguments.

    Raises UnsupportedError for devices that no backend serves.
    """
    kind = q.device.type
    if kind == "cuda":
        from . import triton as backend
    elif kind == "cpu":
        from . import cpu as backend
    else:
        raise UnsupportedError(
            f'device {q.device} has no stof backend: use a CUDA GPU or the CPU, or attn_implementation="sdpa"'
        )
    return backend.forward(q, k, v, mask, **rest)


def row_wise(valid_share: float, seq_len: int) -> bool:
    """The paper's rule: row-wise kernels where few of the 16 x 16 blocks hold an allowed pair.

    Row-wise if rho < tau = 1.2 / log2(S / 16)^2, with rho the share of valid blocks (STOF, PPoPP
    '26, section on the analytical model).

    Args:
        valid_share: rho, in [0, 1].
        seq_len: S, in tokens.
    """
    return seq_len > 16 and valid_share < 1.2 / math.log2(seq_len / 16) ** 2
