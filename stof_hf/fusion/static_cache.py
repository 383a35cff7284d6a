"""Transformers' static caches, written to by one kernel a layer instead of five, or ten.

A step of decoding puts one key and value a sequence into each layer's cache: at the next place, or,
where a layer keeps a window that is full, behind the last one, which moves all of the others. No
number comes from the host for it, so that a CUDA graph can hold it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from transformers.cache_utils import Cache, StaticCache, StaticLayer, StaticSlidingWindowLayer

from ..kernels import dependent
from ..kernels.dependent import await_kernels_before
from .templates.norm_common import on_device_of

__all__ = ["append"]

#: Elements of keys that a program puts down, and the most columns of a window that it moves.
_ELEMENTS, _COLUMNS = 8192, 16
#: Bytes of keys that a program's registers hold, and the longest window that is moved so.
_BYTES, _LONGEST = 65536, 4096


@triton.jit
def append_kernel(
    k_ptr, v_ptr, keys_ptr, values_ptr, length_ptr, count, heads, tokens, room,
    k_b, k_h, k_s, v_b, v_h, v_s, keys_b, keys_h, keys_s, values_b, values_h, values_s,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, ALONE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """ROWS of `count` rows of keys and values behind the first `length`, which grows."""
    await_kernels_before(DEPENDENT)
    length = tl.load(length_ptr)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    b, h, s = row // tokens // heads, row // tokens % heads, row % tokens
    place = length + s
    tl.device_assert((row >= count) | (place < room), "a static cache is full")
    column = tl.arange(0, BLOCK_D)
    inside = ((row < count) & (place < room))[:, None] & (column < D)[None, :]
    given = (b * k_b + h * k_h + s * k_s)[:, None] + column[None, :]
    kept = (b * keys_b + h * keys_h + place * keys_s)[:, None] + column[None, :]
    tl.store(keys_ptr + kept, tl.load(k_ptr + given, mask=inside), mask=inside)
    given = (b * v_b + h * v_h + s * v_s)[:, None] + column[None, :]
    kept = (b * values_b + h * values_h + place * values_s)[:, None] + column[None, :]
    tl.store(values_ptr + kept, tl.load(v_ptr + given, mask=inside), mask=inside)
    if ALONE:
        # All threads have read the length.
        tl.debug_barrier()
        tl.store(length_ptr, length + tokens)


@triton.jit
def _shift(new_ptr, kept_ptr, stride, place, room, column, inside):
    """[places, columns] of a window as they are one token later."""
    at = kept_ptr + ((place + 1) * stride)[:, None] + column[None, :]
    x = tl.load(at, mask=(place < room - 1)[:, None] & inside[None, :])
    new = tl.load(new_ptr + column, mask=inside)
    return tl.where((place == room - 1)[:, None], new[None, :], x)


@triton.jit
def shift_kernel(
    k_ptr, v_ptr, keys_ptr, values_ptr, heads, room,
    k_b, k_h, v_b, v_h, keys_b, keys_h, keys_s, values_b, values_h, values_s,
    D: tl.constexpr, COLUMNS: tl.constexpr, PLACES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """COLUMNS of a head's window: the first token leaves, a new one comes in at the end."""
    await_kernels_before(DEPENDENT)
    b, h = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    place = tl.arange(0, PLACES).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < D
    keys_ptr += b * keys_b + h * keys_h
    values_ptr += b * values_b + h * values_h
    k = _shift(k_ptr + b * k_b + h * k_h, keys_ptr, keys_s, place, room, column, inside)
    v = _shift(v_ptr + b * v_b + h * v_h, values_ptr, values_s, place, room, column, inside)
    # Everything is read before anything is written.
    tl.debug_barrier()
    both = (place < room)[:, None] & inside[None, :]
    tl.store(keys_ptr + (place * keys_s)[:, None] + column[None, :], k, mask=both)
    tl.store(values_ptr + (place * values_s)[:, None] + column[None, :], v, mask=both)


def append(
    cache: Cache, k: torch.Tensor, v: torch.Tensor, index: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What `cache.update(k, v, index)` does and returns, or None where these kernels do not do it.

    They do for layers of a StaticCache that are set up and not offloaded: the length lies on the
    device, so that a CUDA graph can repeat it.

    Args:
        k, v: [B, Hkv, S, D], new tokens' keys and values.
        index: the layer's.
    """
    if type(cache) is not StaticCache or cache.offloading:
        return None
    layer = cache.layers[index]
    if not layer.is_initialized or not _fits(layer, k, v):
        return None
    tokens, room = k.shape[2], layer.max_cache_len
    if type(layer) is StaticSlidingWindowLayer:
        before = layer.cumulative_length_int
        if before >= room:
            if tokens > 1 or room > _LONGEST:
                return None
            _move(layer, k, v)
        elif before + tokens > room:
            return None
        else:
            _put(layer, k, v)
        layer.cumulative_length_int = before + tokens
    elif type(layer) is StaticLayer:
        _put(layer, k, v)
    else:
        return None
    return layer.keys, layer.values


def _fits(layer: StaticLayer, k: torch.Tensor, v: torch.Tensor) -> bool:
    keys, values = layer.keys, layer.values
    same = all(x.dtype == keys.dtype and x.device == keys.device for x in (k, v, values))
    sizes = k.shape == v.shape and keys.shape == values.shape
    rows = (*k.shape[:2], k.shape[3]) == (*keys.shape[:2], keys.shape[3])
    return same and sizes and rows and all(x.stride(3) == 1 for x in (k, v, keys, values))


def _put(layer: StaticLayer, k: torch.Tensor, v: torch.Tensor) -> None:
    batch, heads, tokens, dim = k.shape
    count, width = batch * heads * tokens, triton.next_power_of_2(dim)
    rows = min(triton.next_power_of_2(count), max(1, _ELEMENTS // width))
    keys, values, length = layer.keys, layer.values, layer.cumulative_length
    programs = triton.cdiv(count, rows)
    with on_device_of(k):
        append_kernel[(programs,)](
            k, v, keys, values, length, count, heads, tokens, keys.shape[2],
            *k.stride()[:3], *v.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
            D=dim, BLOCK_D=width, ROWS=rows, ALONE=programs == 1, num_warps=8, debug=True,
            sanitize_overflow=False, **dependent.options(k.device),
        )  # fmt: skip
    if programs > 1:
        length.add_(tokens)


def _move(layer: StaticSlidingWindowLayer, k: torch.Tensor, v: torch.Tensor) -> None:
    batch, heads, _, dim = k.shape
    keys, values = layer.keys, layer.values
    places = triton.next_power_of_2(keys.shape[2])
    columns = min(_COLUMNS, _BYTES // (places * keys.itemsize))
    warps = min(32, max(4, places * columns * keys.itemsize // 2048))
    with on_device_of(k):
        shift_kernel[(batch * heads, triton.cdiv(dim, columns))](
            k, v, keys, values, heads, keys.shape[2], *k.stride()[:2], *v.stride()[:2],
            *keys.stride()[:3], *values.stride()[:3], D=dim, COLUMNS=columns, PLACES=places,
            num_warps=warps, **dependent.options(k.device),
        )  # fmt: skip
