"""The `triton` backend: prepares and launches the kernels of `triton_kernels.py`.

What calls with the same mask, shapes and strides share is worked out once (`calls.py`): the work
list, the grid, the compiled kernel. A later call allocates its outputs and launches.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton

from ..errors import UnsupportedError
from ..kernels.dependent import overlaps
from ..masks.bits import TILE
from ..masks.sparse_mask import SparseMask
from . import calls, select
from . import triton_kernels as kernels
from .dropout import Dropout
from .plan import (
    block_plan,
    device_block_plan,
    device_tile_lists,
    device_tile_table,
    run_share,
    tile_lists,
    tile_table,
)
from .relative import Bias, RelativeBias
from .triton_launch import INTERPRETED, Kernel

#: Heads that run together: their keys and values should stay in this much of L2.
_L2_BYTES = 24 << 20


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: SparseMask | None,
    *,
    bias: Bias | None = None,
    sinks: torch.Tensor | None = None,
    scale: float,
    softcap: float = 0.0,
    dropout: Dropout | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `attention.op`; returns (out [B, Sq, H, Dv], lse fp32 [B, H, Sq])."""
    name, make, seed = "triton calls", prepare, None
    if dropout is not None:
        name, seed = f"triton calls that drop {dropout.threshold}", dropout.seed
        make = partial(prepare_dropout, dropout.threshold)
        if mask is not None and mask.is_view:
            # Of decoding, and the block-wise kernel reads masks that begin where a call does.
            mask = SparseMask.from_dense(mask.to_dense())
    return calls.forward(
        name, make, q, k, v, mask,
        bias=bias, sinks=sinks, scale=scale, softcap=softcap, seed=seed,
    )  # fmt: skip


def prepare(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SparseMask,
    bias: Bias | None, sinks: torch.Tensor | None, scale: float, softcap: float,
    on_device: bool, with_lse: bool = True,
) -> _RowCall | _BlockCall:  # fmt: skip
    """See `calls.forward`."""
    make = _RowCall if select.use_row_wise(q, _padded(q, v), mask) else _BlockCall
    return make(q, k, v, mask, bias, sinks, scale, softcap, on_device, with_lse)


def prepare_dropout(
    threshold: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> _BlockCall:
    """See `calls.forward`; block-wise whatever the mask.

    Raises UnsupportedError where tiles do not fit into shared memory.
    """
    if not select.fits_block_wise(q, _padded(q, v)):
        raise UnsupportedError(
            f"attention dropout with heads of size {max(q.shape[3], v.shape[3])} as {q.dtype} does "
            "not fit into shared memory: train in bf16 or fp16, or under torch.autocast, or set "
            "the model's attention dropout to 0"
        )
    return _BlockCall(q, k, v, *rest, with_lse=True, dropout=threshold)


def _padded(q: torch.Tensor, v: torch.Tensor) -> int:
    return max(16, triton.next_power_of_2(max(q.shape[3], v.shape[3])))


def _strides(x: torch.Tensor, keep: int) -> tuple[int, ...]:
    """The first `keep` strides, 0 along dimensions of size 1 that broadcast."""
    return tuple(0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True))[:keep]


class _Common:
    """What both kinds of calls share: sizes, optional tensors, outputs."""

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SparseMask,
        bias: Bias | None, sinks: torch.Tensor | None, with_lse: bool,
    ):  # fmt: skip
        self.with_lse = with_lse
        self.batch, self.heads, self.q_len, self.dim = q.shape
        self.kv_heads, self.kv_len, self.v_dim = k.shape[1], k.shape[2], v.shape[3]
        self.bd = max(16, triton.next_power_of_2(self.dim))
        self.bdv = max(16, triton.next_power_of_2(self.v_dim))
        self.words = mask.tile_bits.view(torch.int32)
        pattern = mask.pattern_id
        strides = tuple(
            0 if n == 1 else s for n, s in zip(pattern.shape, pattern.stride(), strict=True)
        )
        valid_stride = (
            0 if mask.kv_valid is None or len(mask.kv_valid) == 1 else 2 * mask.kv_valid.stride(0)
        )
        self.qkv_strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
        if bias is None:
            kind, self.bias_strides = kernels.NO_BIAS, (0, 0, 0, 0)
        elif isinstance(bias, RelativeBias):
            kind, self.bias_strides = kernels.BY_DISTANCE, (*_strides(bias.copies, 3), 1)
        else:
            kind, self.bias_strides = kernels.BY_PAIR, _strides(bias, 4)
        self.bias_kind = kind.value
        self.whole = self.kv_len % TILE == 0
        # Rows of a bias begin at multiples of 16 elements, and its keys lie side by side.
        self.bias_aligned = self.bias_strides[3] == 1 and all(
            n % 16 == 0 for n in (*self.bias_strides[:3], self.kv_len)
        )
        self.mask_strides = (*strides, valid_stride)

    def outputs(self, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The result and the logarithms, for which the result stands in where nobody asks."""
        out = torch.empty(
            self.batch, self.q_len, self.heads, self.v_dim, dtype=q.dtype, device=q.device
        )
        if not self.with_lse:
            return out, out
        shape = (self.batch, self.heads, self.q_len)
        return out, torch.empty(shape, dtype=torch.float32, device=q.device)

    @staticmethod
    def optional(
        mask: SparseMask,
        bias: Bias | None,
        sinks: torch.Tensor | None,
        stand_in: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        valid = mask.kv_valid
        if isinstance(bias, RelativeBias):
            bias = bias.copies
        return (
            stand_in if valid is None else valid.view(torch.int32),
            stand_in if bias is None else bias,
            stand_in if sinks is None else sinks,
        )


class _BlockCall(_Common):
    """Block-wise attention for one mask and one set of shapes."""

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SparseMask,
        bias: Bias | None, sinks: torch.Tensor | None, scale: float, softcap: float,
        on_device: bool, with_lse: bool, dropout: int = 0,
    ):  # fmt: skip
        super().__init__(q, k, v, mask, bias, sinks, with_lse)
        copies = self.batch * self.heads
        # What is dropped is known of tiles of 64 keys: runs of full ones are listed, too.
        runs = 0.0 if on_device or dropout else run_share(mask)
        config = select.block_config(q, _padded(q, v), runs)
        if on_device:
            plan = device_block_plan(mask)
        else:
            plan = block_plan(mask, config.rows, copies, config.workers, config.unit)
        self.plan, self.split = plan, plan.slots > 0
        n_items = plan.items.shape[1]
        per_head = (
            self.kv_len * (self.dim + self.v_dim) * k.element_size() * self.kv_heads // self.heads
        )
        # The keys of heads that run together should stay in L2. Where a few items are far heavier
        # than the rest, all heads run together, so that the heaviest of all start first.
        together = min(copies, max(1, _L2_BYTES // per_head))
        if plan.unevenness * config.workers > 2 * together:
            together = copies
        groups = triton.cdiv(copies, together)
        grid = (triton.cdiv(copies, groups), n_items, groups)
        simple = scale > 0 and softcap == 0 and bias is None
        has_valid, has_sinks = mask.kv_valid is not None, sinks is not None
        numbers = (
            *self.qkv_strides, *self.bias_strides, *self.mask_strides,
            self.heads // self.kv_heads, self.heads, copies, self.q_len,
            self.kv_len, n_items, plan.slots, float(scale), float(softcap),
        )  # fmt: skip
        constants = (
            self.dim, self.v_dim, self.bd, self.bdv, plan.rows, config.unit, self.split,
            len(mask.row_ptr) > 1, self.whole, has_valid, softcap > 0,
            self.bias_kind, self.bias_aligned, has_sinks, with_lse, simple, config.stages,
            INTERPRETED, overlaps(q.device), dropout,
        )  # fmt: skip
        self.main = Kernel(
            kernels.block_kernel, grid, (plan.items, plan.steps, self.words, mask.pattern_id),
            numbers + constants,
            num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers,
            launch_pdl=overlaps(q.device),
        )  # fmt: skip
        if self.split:
            merges = plan.merges.shape[1]
            cut = 16
            self.merge = Kernel(
                kernels.merge_kernel, (copies, merges * (plan.rows // cut)),
                (plan.merges, mask.pattern_id),
                (*self.mask_strides[:2], self.heads, self.q_len, merges, plan.slots, self.v_dim,
                 self.bdv, plan.rows, cut, has_sinks, with_lse),
                num_warps=4,
            )  # fmt: skip

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SparseMask,
        bias: Bias | None, sinks: torch.Tensor | None, seed: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        out, lse = self.outputs(q)
        plan, part, part_ml = self.plan, lse, lse
        if self.split:
            n = self.batch * self.heads * plan.slots
            part = torch.empty(n, plan.rows, self.bdv, dtype=torch.float32, device=q.device)
            part_ml = torch.empty(n, 2, plan.rows, dtype=torch.float32, device=q.device)
        valid, bias, sinks = self.optional(mask, bias, sinks, lse)
        self.main(q, k, v, out, lse, part, part_ml, valid, bias, sinks, more=(seed,))
        if self.split:
            self.merge(out, lse, part, part_ml, sinks)
        return out, lse


class _RowCall(_Common):
    """Row-wise attention, keys split over programs: decoding, and very sparse small masks."""

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SparseMask,
        bias: Bias | None, sinks: torch.Tensor | None, scale: float, softcap: float,
        on_device: bool, with_lse: bool,
    ):  # fmt: skip
        super().__init__(q, k, v, mask, bias, sinks, with_lse)
        group = self.heads // self.kv_heads
        config = select.row_config(q, k, _padded(q, v))
        patterns, tile_rows = len(mask.row_ptr), mask.row_ptr.shape[1] - 1
        masked = mask.pattern != calls.FULL_PATTERN
        # Triton's pipeliner (3.6, 3.9) fails on loads of a bias whose place a list of tiles tells.
        alone = self.q_len == 1 and patterns == 1 and bias is None
        listed = masked and alone and config.keys == TILE
        if listed:
            table, steps = device_tile_lists(mask) if on_device else tile_lists(mask)
            tile_cols = 0
        else:
            table = steps = device_tile_table(mask) if on_device else tile_table(mask)
            tile_cols = table.shape[2]
        self.take, self.splits = config.take, config.splits
        self.takes = triton.cdiv(self.q_len, self.take)
        starts = [isinstance(s, torch.Tensor) for s in (mask.row_start, mask.col_start)]
        begins = starts[1] or mask.col_start != 0
        has_sinks, split = sinks is not None, self.splits > 1
        numbers = (
            *self.qkv_strides, *self.bias_strides, *self.mask_strides, self.heads, self.q_len,
            self.kv_len, tile_rows, tile_cols, config.keys_per_split, self.splits, float(scale),
            float(softcap),
        )  # fmt: skip
        constants = (
            group, self.take, self.dim, self.v_dim, self.bd, self.bdv,
            max(16, triton.next_power_of_2(self.take * group)), config.keys, split, masked,
            listed, masked and patterns > 1, *starts, masked and begins,
            self.whole, mask.kv_valid is not None, softcap > 0, self.bias_kind, self.bias_aligned,
            has_sinks and not split, with_lse and not split, config.stages, INTERPRETED,
        )  # fmt: skip
        grid = (self.batch * self.kv_heads, self.takes * self.splits)
        self.main = Kernel(
            kernels.row_kernel,
            grid,
            (table, steps, self.words, mask.pattern_id),
            numbers + constants,
            num_warps=4,
            num_stages=config.stages,
        )
        if self.splits > 1:
            self.merge = Kernel(
                kernels.row_merge_kernel, (self.batch * self.heads, self.q_len), (),
                (self.heads, self.q_len, self.splits, self.take, self.v_dim, self.bdv,
                 triton.next_power_of_2(self.splits), has_sinks, with_lse),
                num_warps=4,
            )  # fmt: skip

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SparseMask,
        bias: Bias | None, sinks: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        out, lse = self.outputs(q)
        part, part_ml = lse, lse
        if self.splits > 1:
            n = self.batch * self.heads * self.takes * self.splits * self.take
            part = torch.empty(n, self.bdv, dtype=torch.float32, device=q.device)
            part_ml = torch.empty(2 * n, dtype=torch.float32, device=q.device)
        valid, bias, sinks = self.optional(mask, bias, sinks, lse)
        starts = (mask.row_start, mask.col_start)
        self.main(q, k, v, out, lse, part, part_ml, valid, bias, sinks, more=starts)
        if self.splits > 1:
            self.merge(out, lse, part, part_ml, sinks)
        return out, lse
