"""From a SparseMask back to dense tensors, counts and FlexAttention's BlockMask."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import BlockMask

from ..errors import MaskError
from . import bits
from .bits import TILE
from .sparse_mask import EMPTY, FULL, SparseMask


def _run_rows(mask: SparseMask) -> torch.Tensor:
    """Of each run, pattern * tile rows + tile row, int64 [R]."""
    count = (mask.row_ptr[:, 1:] - mask.row_ptr[:, :-1]).flatten()
    rows = torch.arange(len(count), device=mask.device)
    return rows.repeat_interleave(count, output_size=len(mask.run_col))


def _spread(
    rows: int, columns: int, row: torch.Tensor, mask: SparseMask, amount: torch.Tensor
) -> torch.Tensor:
    """The sum of `amount` over the runs that cover each tile: [rows, columns], in its dtype."""
    edges = torch.zeros(rows * (columns + 1), dtype=amount.dtype, device=mask.device)
    begin = row * (columns + 1) + mask.run_col
    edges.index_add_(0, begin, amount)
    edges.index_add_(0, begin + mask.run_len, -amount)
    return edges.view(rows, columns + 1).cumsum(1, dtype=amount.dtype)[:, :-1]


def tile_map(mask: SparseMask) -> torch.Tensor:
    """Content of each tile of the storage: -2 empty, -1 full, else an index of tile_bits.

    int32 [P, tile rows, tile columns].
    """
    columns = bits.words_per(mask.kv_len)
    if mask.is_view and len(mask.run_col):
        columns = int((mask.run_col + mask.run_len).max())
    patterns, tile_rows = mask.row_ptr.shape[0], mask.row_ptr.shape[1] - 1
    row = _run_rows(mask)
    out = _spread(patterns * tile_rows, columns, row, mask, mask.run_bits - EMPTY)
    return out.add_(EMPTY).view(patterns, tile_rows, columns)


def to_dense(mask: SparseMask) -> torch.Tensor:
    """See `SparseMask.to_dense`."""
    row, col = int(mask.row_start), int(mask.col_start)
    top, left = row // TILE, col // TILE
    bottom, right = bits.words_per(row + mask.q_len), bits.words_per(col + mask.kv_len)
    # A view may be a sliver of a storage too large to be made dense.
    content = tile_map(mask)[:, top:bottom, left:right]
    content = torch.nn.functional.pad(content, (0, right - left - content.shape[2]), value=EMPTY)
    extra = torch.tensor([0, -1], device=mask.device)[:, None].expand(2, TILE)
    words = torch.cat([extra, mask.tile_bits])[(content - EMPTY).long()]
    words = words.permute(0, 1, 3, 2).flatten(1, 2)
    row, col = row - top * TILE, col - left * TILE
    dense = bits.unpack(words, words.shape[-1] * TILE)
    dense = dense[:, row : row + mask.q_len, col : col + mask.kv_len][mask.pattern_id.long()]
    if mask.kv_valid is not None:
        dense = dense & bits.unpack(mask.kv_valid, mask.kv_len)[:, None, None]
    return dense


def count_kept(mask: SparseMask) -> int:
    """See `SparseMask.kept`: counted by columns, so that padding is one product."""
    if mask.is_view:
        return int(to_dense(mask).sum())
    patterns, tile_rows = mask.row_ptr.shape[0], mask.row_ptr.shape[1] - 1
    columns = bits.words_per(mask.kv_len)
    row = _run_rows(mask)
    pattern = row // tile_rows
    used = (mask.q_len - row % tile_rows * TILE).clamp(max=TILE)
    full = mask.run_bits == FULL
    per_column = _spread(patterns, columns, pattern, mask, used * full)
    per_column = per_column.repeat_interleave(TILE, dim=1).view(-1, TILE)
    place = pattern * columns + mask.run_col
    for part in (~full).nonzero().squeeze(1).split(512):
        words = mask.tile_bits[mask.run_bits[part].long()]
        per_column.index_add_(0, place[part], bits.unpack(words[..., None], TILE).sum(1))
    per_column = per_column.view(patterns, -1)[:, : mask.kv_len]
    per_column = per_column[mask.pattern_id.long()].sum(1)
    if mask.kv_valid is None:
        return int(per_column.sum())
    return int((per_column * bits.unpack(mask.kv_valid, mask.kv_len)).sum())


def mask_function(mask: SparseMask) -> Callable[..., torch.Tensor]:
    """f(b, h, q, k) -> bool, the mask's elements, padding included; positions in the storage."""
    content, pid = tile_map(mask), mask.pattern_id.long()
    words, valid = mask.tile_bits, mask.kv_valid
    if not len(words):
        words = words.new_zeros(1, TILE)
    per_batch, per_head = (n > 1 for n in mask.pattern_id.shape)
    padded_batch = valid is not None and len(valid) > 1

    def function(
        b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor:
        p = pid[b if per_batch else b * 0, h if per_head else h * 0]
        tile = content[p, q // TILE, k // TILE]
        word = words[tile.clamp(min=0), q % TILE]
        allowed = (tile == FULL) | ((tile >= 0) & (((word >> (k % TILE)) & 1) == 1))
        if valid is not None:
            word = valid[b if padded_batch else b * 0, k // TILE]
            allowed = allowed & (((word >> (k % TILE)) & 1) == 1)
        return allowed

    return function


def to_block_mask(mask: SparseMask, block_size: int) -> BlockMask:
    """See `SparseMask.to_block_mask`."""
    if mask.is_view:
        raise MaskError("a decode view has no BlockMask: convert the mask it was made of")
    partial = _blocks(tile_map(mask)[mask.pattern_id.long()] != EMPTY, mask, block_size)
    return BlockMask.from_kv_blocks(
        *partial,
        BLOCK_SIZE=block_size,
        mask_mod=mask_function(mask),
        seq_lengths=(mask.q_len, mask.kv_len),
    )


def _blocks(
    held: torch.Tensor, mask: SparseMask, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """kv_num_blocks and kv_indices of the blocks that hold a stored tile."""
    if block_size % TILE:
        raise MaskError(f"block_size must be a multiple of {TILE}, not {block_size}")
    per = block_size // TILE
    rows, cols = -(-held.shape[2] // per), -(-held.shape[3] // per)
    pad = (0, cols * per - held.shape[3], 0, rows * per - held.shape[2])
    held = torch.nn.functional.pad(held, pad)
    held = held.view(*held.shape[:2], rows, per, cols, per).any(-1).any(-2)
    if mask.kv_valid is not None:
        held = held.expand(mask.shape[0], -1, -1, -1)
    index = torch.argsort(held.int(), dim=-1, descending=True, stable=True)
    return held.sum(-1, dtype=torch.int32), index.to(torch.int32)
