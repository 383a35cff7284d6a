"""Gradients by the kernels of `triton_backward_kernels.py`: prepares and launches them.

As in the forward (`triton.py`), what calls with the same mask, shapes and strides share is worked
out once and kept with the mask. Beyond the gradients a call takes two numbers for each row, and the
pieces of the blocks that are split.
"""

from __future__ import annotations

import math

import torch
import triton

from ..masks.bits import TILE
from ..masks.cache import mask_for
from ..masks.device import keep
from ..masks.sparse_mask import SparseMask
from . import backward_plan, calls, gradients
from . import triton_backward_kernels as kernels
from .backward import gradient_like
from .dropout import Dropout
from .plan import run_share
from .triton_launch import INTERPRETED, Kernel

#: Heads that run together: their tensors should stay in this much of L2.
_L2_BYTES = 24 << 20
#: Rows that a program of the smaller kernels reads.
_STATISTICS_ROWS, _SUM_ROWS = 64, 16
#: The statistics are padded to the rows of the largest block.
_MOST_ROWS = 128
_MOST_CALLS = 256


def backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, mask: SparseMask | None, scale: float, softcap: float,
    dropout: Dropout | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of q, k and v, laid out as `gradient_like` says, and rowsum(dO O), fp32 [B, H, Sq].

    Args:
        grad, out: [B, Sq, H, Dv]. lse: fp32 [B, H, Sq]. The rest as for the forward; the mask is
            no view.

    Equal calls give equal bits.
    """
    if q.is_cuda and q.device.index != torch.cuda.current_device():
        with torch.cuda.device(q.device):
            return backward(grad, q, k, v, out, lse, mask, scale, softcap, dropout)
    if mask is None:
        mask = mask_for(calls.FULL_PATTERN, q.shape[2], k.shape[2], device=q.device)
    made = gradient_like(q), gradient_like(k), gradient_like(v)
    grad, q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (grad, q, k, v))
    tensors = (grad, q, k, v)
    valid = mask.kv_valid
    seed, threshold = (None, 0) if dropout is None else (dropout.seed, dropout.threshold)
    key = (
        *((x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0) for x in tensors),
        *(x.stride() for x in made), scale, softcap, threshold,
        None if valid is None else valid.shape,
    )  # fmt: skip
    known = mask.plans.setdefault("triton backward calls", {})
    call = known.get(key)
    if call is None:
        capturing = q.is_cuda and torch.cuda.is_current_stream_capturing()
        on_device = capturing or "host_runs" not in mask.plans
        call = keep(
            lambda: _Call(*tensors, *made, mask, scale, softcap, on_device, threshold), q.device
        )
        if len(known) >= _MOST_CALLS:
            known.clear()
        # What a capture computes belongs to its graph.
        if not capturing:
            known[key] = call
    return *made, call(*tensors, *made, out, lse, mask, seed)


class _Call:
    """The gradients for one mask and one set of shapes and strides."""

    def __init__(
        self, grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, mask: SparseMask, scale: float,
        softcap: float, on_device: bool, dropout: int = 0,
    ):  # fmt: skip
        batch, heads, q_len, dim = q.shape
        kv_heads, kv_len, v_dim = k.shape[1], k.shape[2], v.shape[3]
        group, patterns = heads // kv_heads, len(mask.row_ptr)
        # Heads with masks of their own cannot walk the tiles of a block of keys together.
        self.apart = group > 1 and patterns > 1 and mask.pattern_id.shape[1] > 1
        shared = 1 if self.apart else group
        self.copies, self.shared = batch * heads, shared
        if self.apart:
            dk, dv = self._by_head(dq, dk), self._by_head(dq, dv)
        bd, bdv = (max(16, triton.next_power_of_2(n)) for n in (dim, v_dim))
        runs = 0.0 if on_device else run_share(mask)
        config = gradients.config(q, max(bd, bdv), runs, softcap, dropout > 0)
        assert config is not None, "gradients.backward asks first"
        rows, unit = (TILE, 0) if on_device else (config.rows, config.unit)
        plan = (
            backward_plan.device_backward_plan(mask)
            if on_device
            else backward_plan.backward_plan(mask, rows, self.copies, shared, config.workers, unit)
        )
        self.by_queries, self.by_keys = plan.queries, plan.keys
        self.rows, self.widths = rows, (bd, bd + bdv)
        self.split = self.by_queries.slots + self.by_keys.slots > 0
        self.padded = -(-q_len // _MOST_ROWS) * _MOST_ROWS

        strides = tuple(
            0 if n == 1 else s
            for n, s in zip(mask.pattern_id.shape, mask.pattern_id.stride(), strict=True)
        )
        valid = mask.kv_valid
        valid_stride = 0 if valid is None or len(valid) == 1 else 2 * valid.stride(0)
        g_b, g_s, g_h, _ = grad.stride()
        made_strides = (*dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3])
        n_items_q, n_items_k = self.by_queries.items.shape[1], self.by_keys.items.shape[1]
        slots = self.by_queries.slots, self.by_keys.slots
        copies = self.copies // shared
        together = self._together(q, k, v, config.workers)
        groups = triton.cdiv(copies, together)
        together = triton.cdiv(copies, groups)
        simple = scale > 0 and softcap == 0
        self.statistics = Kernel(
            kernels.statistics_kernel, (self.copies, self.padded // _STATISTICS_ROWS), (),
            (g_b, g_h, g_s, heads, q_len, self.padded, float(scale) if simple else math.log(2),
             v_dim, bdv, _STATISTICS_ROWS),
            num_warps=4,
        )  # fmt: skip
        items = torch.cat([self.by_keys.items, self.by_queries.items], 1)
        self.main = Kernel(
            kernels.gradients_kernel,
            (groups * together * (n_items_k + shared * n_items_q),),
            (items, self.by_queries.steps, mask.tile_bits.view(torch.int32),
             self.by_keys.steps, plan.words.view(torch.int32), mask.pattern_id),
            (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], g_b, g_h, g_s, *made_strides,
             *strides, valid_stride, group, shared, heads, self.copies, together, q_len, kv_len,
             self.padded, n_items_q, n_items_k, *slots, float(scale), float(softcap),
             dim, v_dim, bd, bdv, rows, unit, self.split, patterns > 1, shared > 1,
             q_len % TILE == 0, kv_len % TILE == 0, valid is not None, simple, softcap > 0,
             config.stages, dropout, INTERPRETED),
            num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers,
        )  # fmt: skip
        if self.split:
            merges = [x.merges for x in (self.by_keys, self.by_queries)]
            n_merges_k, n_merges_q = (x.shape[1] for x in merges)
            self.sum = Kernel(
                kernels.sum_kernel,
                (self.copies, (n_merges_k + n_merges_q) * (rows // _SUM_ROWS)),
                (torch.cat(merges, 1), mask.pattern_id),
                (*made_strides, *strides, shared, heads, q_len, kv_len, n_merges_q, n_merges_k,
                 *slots, float(scale), dim, v_dim, bd, bdv, rows, _SUM_ROWS),
                num_warps=4,
            )  # fmt: skip

    def _together(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, workers: int) -> int:
        """How many times `shared` heads run at a time; see `triton._BlockCall`."""
        copies = self.copies // self.shared
        per_copy = (k.shape[2] + self.shared * q.shape[2]) * (q.shape[3] + v.shape[3]) * q.itemsize
        together = min(copies, max(1, _L2_BYTES // per_copy))
        unevenness = max(self.by_queries.unevenness, self.by_keys.unevenness)
        return copies if unevenness * workers > 2 * together * self.shared else together

    @staticmethod
    def _by_head(dq: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Room in fp32 for a gradient of the keys that each query head has of its own."""
        shape = (*dq.shape[:2], *x.shape[2:])
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    def __call__(
        self, grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
        mask: SparseMask, seed: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        """Writes dq, dk and dv, and returns rowsum(dO O)."""

        def room(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.float32, device=q.device)

        stats = room(*q.shape[:2], self.padded, 2)
        self.statistics(out, grad, lse, stats)
        # Nothing is read of what stands in.
        part_q = part_k = stats
        if self.split:
            copies = self.copies // self.shared
            part_q = room(self.copies * self.by_queries.slots, self.rows, self.widths[0])
            part_k = room(copies * self.by_keys.slots, self.rows, self.widths[1])
        to = (dq, self._by_head(dq, dk), self._by_head(dq, dv)) if self.apart else (dq, dk, dv)
        valid = stats if mask.kv_valid is None else mask.kv_valid.view(torch.int32)
        self.main(q, k, v, grad, stats, *to, part_q, part_k, valid, more=(seed,))
        if self.split:
            self.sum(*to, part_q, part_k)
        if self.apart:
            for x, heads in zip((dk, dv), to[1:], strict=True):
                x.copy_(heads.unflatten(1, (k.shape[1], -1)).sum(2))
        return -stats[:, :, : q.shape[2], 1]
