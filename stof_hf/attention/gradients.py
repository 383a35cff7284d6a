"""Which code computes the gradients of a call, and in which tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..masks.sparse_mask import SparseMask
from . import backward as plain
from .dropout import Dropout
from .select import has_much_shared_memory, multiprocessors, shared_memory


@dataclass(frozen=True)
class BackwardConfig:
    """Of the Triton kernel: rows of a block, queries or keys; warps, pipeline stages; whether runs
    of full tiles have a loop of their own (1) or are listed (0); the most registers of a thread
    (None: what the compiler likes); and the blocks that the device runs at once."""

    rows: int
    warps: int
    stages: int
    unit: int
    registers: int | None
    workers: int


def backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, mask: SparseMask | None, bias: torch.Tensor | None,
    sinks: torch.Tensor | None, scale: float, softcap: float, dropout: Dropout | None = None,
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    """Gradients of (q, k, v, bias, sinks), in their dtypes; None for an absent bias or sinks.

    Triton kernels compute them on CUDA GPUs; plain PyTorch does on CPUs, under a bias, for views of
    a mask, and for tiles that do not fit into shared memory.

    Args:
        grad, out: [B, Sq, H, Dv]. lse: fp32 [B, H, Sq]. The rest as for the forward.
    """
    if not q.is_cuda or bias is not None or not supported(q, v, mask):
        return plain.backward(grad, q, k, v, out, lse, mask, bias, sinks, scale, softcap, dropout)
    from . import triton_backward

    dq, dk, dv, delta = triton_backward.backward(
        grad, q, k, v, out, lse, mask, scale, softcap, dropout
    )
    dsinks = None if sinks is None else plain.sink_gradient(sinks, lse, delta)
    return dq, dk, dv, None, dsinks


def supported(q: torch.Tensor, v: torch.Tensor, mask: SparseMask | None) -> bool:
    """Whether the Triton kernel computes the gradients of such a call without a bias."""
    if mask is not None and mask.is_view:
        return False
    dim = max(q.shape[3], v.shape[3])
    return config(q, max(16, 1 << (dim - 1).bit_length()), 0.0) is not None


def config(
    q: torch.Tensor, dim: int, runs: float, softcap: float = 0.0, dropout: bool = False
) -> BackwardConfig | None:
    """Tiles of the Triton kernel; None where they do not fit into shared memory.

    Args:
        dim: head size padded to a power of 2.
        runs: share of the mask's tiles that lie in long runs of full ones.
        dropout: blocks have 64 rows, as the tiles whose dropped elements a step works out.
    """
    processors = multiprocessors(q.device)
    hopper = has_much_shared_memory(q.device)
    unit = int(runs > 0.6)
    if q.dtype == torch.float32:
        # Elsewhere a thread would keep tens of kilobytes outside its registers.
        fits = hopper and dim <= 64
        return BackwardConfig(64, 8, 1, unit, None, processors) if fits else None
    if dim > 128:
        if shared_memory(q.device) < 140 << 10:
            return None
        # With one loop alone, ptxas (12.8) lets products wait for one another.
        return BackwardConfig(64, 8, *((2, 1) if hopper else (1, unit)), None, processors)
    if not hopper:
        return BackwardConfig(64, 8, 2, unit, None, 2 * processors)
    if dropout:
        # As above, of one loop alone.
        return BackwardConfig(64, 4, 2, 1, None, 2 * processors)
    if dim <= 64 and not softcap:
        # Three blocks a multiprocessor, for a few spilled registers; with a loop for runs of full
        # tiles there would be more.
        return BackwardConfig(64, 4, 2, 0, 168, 3 * processors)
    batch, heads, q_len, _ = q.shape
    if unit and batch * heads * (q_len // 128) >= 4 * processors:
        # Blocks of 64 rows would ask the L2 cache for more than it delivers.
        return BackwardConfig(128, 8, 2, unit, None, processors)
    return BackwardConfig(64, 4, 2, unit, None, 2 * processors)
