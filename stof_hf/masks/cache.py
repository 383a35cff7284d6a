"""Masks that were built before: one dictionary look-up instead of a build.

Generation asks for a mask in every step. A pattern whose longer mask contains the shorter one is
therefore built once for a round number of positions, and each step gets a view of it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch

from .as_tensor import FEW_ROWS
from .device import keep
from .pattern import Pattern
from .sparse_mask import STRUCTURE, SparseMask

_LEAST_POSITIONS = 4096
_given: ContextVar[list[SparseMask] | None] = ContextVar("given", default=None)
#: What graphs read that others capture, such as torch.compile: nobody says when they are gone.
_captured: set[SparseMask] = set()


@lru_cache(maxsize=64)
def _built(
    pattern: Pattern, q_len: int, kv_len: int, q_offset: int, kv_offset: int, device: torch.device
) -> SparseMask:
    offsets = {"q_offset": q_offset, "kv_offset": kv_offset}
    mask = keep(
        lambda: SparseMask.from_pattern(pattern, q_len, kv_len, **offsets, device=device), device
    )
    # A compiled step gets these very tensors in every call: CUDA graphs of torch.compile need not
    # copy them, and what kernels derived from them is found by them. Who compiles has imported it.
    if "torch._dynamo" in sys.modules:
        for name in STRUCTURE:
            torch._dynamo.mark_static_address(getattr(mask, name))
    return mask


def _shared(*arguments: Any) -> SparseMask:
    mask = _built(*arguments)
    if (given := _given.get()) is not None:
        given.append(mask)
    elif mask.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.add(mask)
    return mask


@contextmanager
def noting() -> Iterator[list[SparseMask]]:
    """Masks that `mask_for` gives out meanwhile: a CUDA graph reads them after this forgot them."""
    given: list[SparseMask] = []
    token = _given.set(given)
    try:
        yield given
    finally:
        _given.reset(token)


def mask_for(
    pattern: Pattern,
    q_len: int,
    kv_len: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    *,
    device: torch.device,
    on_device: bool = False,
) -> SparseMask:
    """The mask of queries q_offset + [0, q_len) and keys kv_offset + [0, kv_len), without padding.

    Args:
        q_offset: an int, or an integer tensor with one element, which is not read where a view does
            (a closed-form `length_free` pattern and at most 16 queries); else it is read once. The
            mask keeps it.
        device: where the mask is stored.
        on_device: give a view's offsets as device tensors, so that a compiled graph that takes the
            mask serves every step.

    The result is shared: masks with equal arguments are one object, views share their storage.
    """
    known = isinstance(q_offset, int)
    # A function or tensor may hold no values beyond the positions asked for.
    longer = pattern.length_free and pattern.serializable
    if not longer or q_len > FEW_ROWS or (known and not q_offset and not on_device):
        return _shared(pattern, q_len, kv_len, int(q_offset), kv_offset, device)
    # With a tensor, the queries are among the keys: kv_len is the size of a static cache.
    positions = kv_offset + kv_len + q_len
    positions = max(positions, q_offset + q_len) if known else positions
    capacity = max(_LEAST_POSITIONS, 1 << (positions - 1).bit_length())
    storage = _shared(pattern, capacity, capacity, 0, 0, device)
    if not known:
        q_offset = q_offset.reshape(1).to(device, torch.int64)
        return storage.rows(q_offset, q_len, kv_len, col_start=kv_offset)
    if on_device:
        starts = (torch.full((1,), start, device=device) for start in (q_offset, kv_offset))
        return storage.rows(next(starts), q_len, kv_len, col_start=next(starts))
    return storage.rows(q_offset, q_len, kv_len, col_start=kv_offset)


def clear() -> None:
    """Forget all masks but those that a CUDA graph reads."""
    _built.cache_clear()
