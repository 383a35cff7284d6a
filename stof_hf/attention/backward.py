"""Gradients of attention, recomputed block by block with plain torch.

Standard flash backward (Dao et al., 2022, arXiv 2205.14135): with P = exp(S - lse) and
delta = rowsum(dO * O), dV = P^T dO, dS = P * (dO V^T - delta); with dropout's factors M, zeros for
what it drops, dV = (P * M)^T dO, dS = P * (M * dO V^T - delta). A block is a few tile rows against
the key tiles that are stored for them, so memory follows the mask, never Sq x Sk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..masks import bits
from ..masks.bits import TILE
from ..masks.sparse_mask import SparseMask
from .dropout import Dropout

_BLOCK_ROWS = 4 * TILE


def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    mask: SparseMask | None,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    dropout: Dropout | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of (q, k, v, bias, sinks), in their dtypes; None for an absent bias or sinks.

    Args:
        grad, out: [B, Sq, H, Dv]. lse: fp32 [B, H, Sq]. The rest as for the forward.
    """
    batch, heads, q_len, dim = q.shape
    made = gradient_like(k), gradient_like(v)
    kv_heads, kv_len = k.shape[1], k.shape[2]
    group = heads // kv_heads
    dq = gradient_like(q)
    dk = torch.zeros(batch, kv_heads, kv_len, dim, device=q.device)
    dv = torch.zeros(batch, kv_heads, kv_len, v.shape[3], device=q.device)
    grad, out = grad.transpose(1, 2), out.transpose(1, 2)
    delta = (grad.float() * out.float()).sum(-1)
    # An empty row has lse = -inf and no allowed key: any finite value serves it.
    base = lse.masked_fill(lse == -torch.inf, 0.0)
    dbias = None
    if bias is not None:
        bias = bias[(None,) * (4 - bias.ndim)]
        dbias = torch.zeros(bias.shape, device=q.device)

    copies = torch.arange(batch * heads, device=q.device).view(batch, heads)

    def fold(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (kv_heads, group)).flatten(2, 3)

    for rows, keys, allowed in blocks(mask, q_len, kv_len, q.device):
        n = rows.stop - rows.start
        qb, gb = q[:, :, rows].float(), grad[:, :, rows].float()
        kb, vb = k[:, :, keys].float(), v[:, :, keys].float()
        if allowed is not None:
            # A key that nobody sees may hold anything, and 0 * NaN is NaN.
            seen = allowed.any(1).any(1)[:, None, :, None]
            kb, vb = kb.masked_fill(~seen, 0), vb.masked_fill(~seen, 0)
        s = scale * (fold(qb) @ kb.transpose(-1, -2)).unflatten(2, (group, n)).flatten(1, 2)
        slope = scale
        if softcap:
            t = torch.tanh(s / softcap)
            s, slope = softcap * t, scale * (1 - t * t)
        if bias is not None:
            s = s + _part(bias, rows, keys).float()
        p = torch.exp(s - base[:, :, rows, None])
        if allowed is not None:
            p = p.masked_fill(~allowed, 0)
        dp = (fold(gb) @ vb.transpose(-1, -2)).unflatten(2, (group, n)).flatten(1, 2)
        weights = p
        if dropout is not None:
            kept = _kept(dropout, copies, rows, keys)
            weights, dp = dropout.scale * (p * kept), dp.mul_(kept).mul_(dropout.scale)
        ds = p * (dp - delta[:, :, rows, None])
        dv.index_add_(2, keys, fold(weights).transpose(-1, -2) @ fold(gb))
        if dbias is not None:
            _add_part(dbias, ds, rows, keys)
        ds = fold(ds * slope)
        dq[:, :, rows] = (ds @ kb).unflatten(2, (group, n)).flatten(1, 2).to(q.dtype)
        dk.index_add_(2, keys, ds.transpose(-1, -2) @ fold(qb))
    dsinks = None if sinks is None else sink_gradient(sinks, lse, delta)
    if dbias is not None:
        dbias = dbias.to(bias.dtype)  # type: ignore[union-attr]
    return dq, made[0].copy_(dk), made[1].copy_(dv), dbias, dsinks


def gradient_like(x: torch.Tensor) -> torch.Tensor:
    """Room for the gradient of x [B, H, S, D]: rows of [B, S, H, D] where x is a view of that.

    So what made x by a transposition gets a gradient that it need not copy.
    """
    batch, heads, length, dim = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty(batch, length, heads, dim).transpose(1, 2)
    return x.new_empty(batch, heads, length, dim)


def sink_gradient(sinks: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Gradient of sinks [H]; lse and delta = rowsum(dO O) are fp32 [B, H, Sq]."""
    share = torch.exp(sinks.float()[None, :, None] - lse.masked_fill(lse == -torch.inf, 0.0))
    return -(share * delta).sum((0, 2)).to(sinks.dtype)


def _kept(dropout: Dropout, copies: torch.Tensor, rows: slice, keys: torch.Tensor) -> torch.Tensor:
    """Of a block of `blocks`, what dropout keeps: bool [B, H, rows, keys]."""
    at = torch.arange(rows.start, rows.stop, device=keys.device)
    # Keys come as whole tiles, of which only the last may be cut short.
    return dropout.kept(copies, at, keys[::32] >> 5)[..., : len(keys)]


def _part(bias: torch.Tensor, rows: slice, keys: torch.Tensor) -> torch.Tensor:
    if bias.shape[2] > 1:
        bias = bias[:, :, rows]
    return bias[..., keys] if bias.shape[3] > 1 else bias


def _add_part(total: torch.Tensor, ds: torch.Tensor, rows: slice, keys: torch.Tensor) -> None:
    over = [d for d in range(4) if total.shape[d] == 1]
    ds = ds.sum(over, keepdim=True) if over else ds
    target = total[:, :, rows] if total.shape[2] > 1 else total
    if total.shape[3] > 1:
        target.index_add_(3, keys, ds)
    else:
        target += ds


def blocks(
    mask: SparseMask | None, q_len: int, kv_len: int, device: torch.device
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | None]]:
    """Blocks that cover all allowed pairs: (query rows, key indices, allowed or None for all).

    `allowed` is bool, [B or 1, H or 1, rows, keys]. Every query row is in exactly one block.
    """
    every_key = torch.arange(kv_len, device=device)
    if mask is None or mask.is_view:
        dense = None if mask is None else mask.to_dense()
        for begin in range(0, q_len, _BLOCK_ROWS):
            rows = slice(begin, min(q_len, begin + _BLOCK_ROWS))
            yield rows, every_key, None if dense is None else dense[:, :, rows]
        return
    ptr, col, length, content = mask.host_runs()
    extra = torch.tensor([0, -1], device=device)[:, None].expand(2, TILE)
    words = torch.cat([extra, mask.tile_bits])
    valid = None if mask.kv_valid is None else bits.unpack(mask.kv_valid, kv_len)[:, None, None]
    per = _BLOCK_ROWS // TILE
    tile_rows, columns = ptr.shape[1] - 1, bits.words_per(kv_len)
    for top in range(0, tile_rows, per):
        count = min(per, tile_rows - top)
        tiles = torch.full((len(ptr), count, columns), -2, dtype=torch.int64)
        for p in range(len(ptr)):
            for i in range(count):
                for r in range(ptr[p, top + i], ptr[p, top + i + 1]):
                    tiles[p, i, col[r] : col[r] + length[r]] = content[r]
        held = torch.nonzero((tiles != -2).any(0).any(0)).squeeze(1)
        rows = slice(top * TILE, min(q_len, (top + count) * TILE))
        chosen = words[(tiles[:, :, held] + 2).to(device)]
        chosen = chosen.permute(0, 1, 3, 2).flatten(1, 2)[:, : rows.stop - rows.start]
        keys = (held[:, None] * TILE + torch.arange(TILE)).flatten().to(device)
        inside = keys < kv_len
        allowed = bits.unpack(chosen, len(keys))[..., inside]
        keys = keys[inside]
        allowed = allowed[mask.pattern_id.long()]
        yield rows, keys, allowed if valid is None else allowed & valid[..., keys]
