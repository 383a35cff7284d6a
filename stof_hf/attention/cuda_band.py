"""Bands of keys on the `cuda` backend: prepares and launches csrc/cuda/band.cu.

No mask, a causal one, a sliding window, or both: what a query sees follows from its position, so
that the kernel reads neither a mask nor a plan.
"""

from __future__ import annotations

import torch

from ..kernels.cuda_kernels import kernel
from ..masks.pattern import And, Pattern
from ..masks.patterns import Causal, Full, SlidingWindow
from ..masks.sparse_mask import SparseMask
from . import select
from .cuda_problem import Call, aligned
from .model import BandForm

#: Lengths, offsets and reaches that the kernel counts with.
_MOST = 1 << 28


def prepare(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SparseMask,
    bias: torch.Tensor | None, sinks: torch.Tensor | None, scale: float, softcap: float,
    with_lse: bool,
) -> BandCall | None:  # fmt: skip
    """See `calls.forward`; None where the kernel does not compute such a call, or another does
    sooner.

    Raises BuildError where the kernel cannot be built.
    """
    if not computes(q, k, v, mask, bias, scale, softcap):
        return None
    if not select.band_is_ahead(q, k, mask, band_of(mask.pattern)):
        return None
    return BandCall(q, k, v, mask, sinks, scale, with_lse)


def computes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SparseMask,
    bias: torch.Tensor | None, scale: float, softcap: float,
) -> bool:  # fmt: skip
    """Whether the kernel computes such a call on the tensors' device."""
    return (
        not mask.is_view and mask.kv_valid is None and bias is None and softcap == 0 and scale > 0
        and band_of(mask.pattern) is not None
        and v.shape[3] == q.shape[3] and aligned(q, k, v)
        and max(q.shape[2], k.shape[2], abs(mask.q_offset - mask.kv_offset)) < _MOST
        and kernel("band", q.shape[3], q.dtype, torch.cuda.get_device_capability(q.device))
        is not None
    )  # fmt: skip


def band_of(pattern: Pattern | None) -> tuple[int, int] | None:
    """How many keys before and behind its own position a query sees, if that is all there is to a
    pattern: a reach that no length exceeds stands for all.

    >>> band_of(Causal() & SlidingWindow(1023, 1023))
    (1023, 0)
    """
    if isinstance(pattern, Full):
        return _MOST, _MOST
    if isinstance(pattern, Causal):
        return _MOST, 0
    if isinstance(pattern, SlidingWindow):
        return min(pattern.left, _MOST), min(pattern.right, _MOST)
    if isinstance(pattern, And):
        bands = [band_of(part) for part in pattern.patterns]
        if None not in bands:
            left, right = (min(sides) for sides in zip(*bands, strict=True))
            return left, right
    return None


class BandCall(Call):
    """A prepared call of the band kernel."""

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SparseMask,
        sinks: torch.Tensor | None, scale: float, with_lse: bool = True,
        form: BandForm | None = None,
    ):  # fmt: skip
        super().__init__("band", q.shape[3], q, k, v, mask, None, sinks, scale, 0.0, with_lse)
        p = self.problem
        p.left, p.right = band = band_of(mask.pattern)
        p.offset = mask.q_offset - mask.kv_offset
        p.grid = select.multiprocessors(q.device)
        p.rows, heads = form or select.band_form(q, k, mask, band)
        p.two_heads = heads == 2
        p.together = select.band_together(q, k)
