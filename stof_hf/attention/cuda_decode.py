"""Decoding on the `cuda` backend: prepares and launches csrc/cuda/decode.cu.

The kernel reads masks as they are kept, so a decode step needs no plan: a view may begin at any row
and column, told by ints or by tensors on the device.
"""

from __future__ import annotations

import torch

from ..kernels.cuda_kernels import kernel
from ..masks.sparse_mask import SparseMask
from . import calls, select
from .cuda_problem import BIAS_DTYPES, MASK, Call, aligned
from .relative import Bias
from .select import DECODE_ROWS

_MOST_KEYS = 1_000_000
#: Bytes of shared memory that two stages of head size 256 need.
_LARGE_HEADS = 160 << 10


def prepare(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SparseMask,
    bias: Bias | None, sinks: torch.Tensor | None, scale: float, softcap: float,
    with_lse: bool = True,
) -> DecodeCall | None:  # fmt: skip
    """See `calls.forward`; None where the kernel does not compute such a call.

    Raises BuildError where the kernel cannot be built.
    """
    capability = torch.cuda.get_device_capability(q.device)
    taken = (
        q.shape[2] <= DECODE_ROWS and k.shape[2] <= _MOST_KEYS and v.shape[3] == q.shape[3]
        and kernel("decode", q.shape[3], q.dtype, capability) is not None
        and aligned(q, k, v)
        and (bias is None or bias.dtype in BIAS_DTYPES)
        and (q.shape[3] <= 128 or select.shared_memory(q.device) >= _LARGE_HEADS)
    )  # fmt: skip
    if not taken:
        return None
    return DecodeCall(q, k, v, mask, bias, sinks, scale, softcap, with_lse=with_lse)


class DecodeCall(Call):
    """A prepared call of the decode kernel."""

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SparseMask,
        bias: Bias | None, sinks: torch.Tensor | None, scale: float, softcap: float,
        splits: int | None = None, with_lse: bool = True,
    ):  # fmt: skip
        super().__init__("decode", q.shape[3], q, k, v, mask, bias, sinks, scale, softcap, with_lse)
        p = self.problem
        p.splits = splits or select.decode_splits(q, k, mask)
        rows = p.batch * p.heads * p.q_len
        p.workspace_bytes = 0 if p.splits == 1 else rows * p.splits * (p.head_dim + 2) * 4
        if mask.pattern != calls.FULL_PATTERN:
            for name in MASK:
                setattr(p.mask, name, getattr(mask, name).data_ptr())
            p.mask.tile_rows = mask.row_ptr.shape[1] - 1
            for name, on_device in zip(("row_start", "col_start"), self.starts, strict=True):
                setattr(p.mask, name, 0 if on_device else getattr(mask, name))
        # The problem holds their addresses.
        self.kept = tuple(getattr(mask, name) for name in (*MASK, "pattern_id"))
