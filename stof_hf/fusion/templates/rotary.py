"""Rotary position embedding of queries and keys, in place, by one kernel.

A program rotates a block of heads of a block of tokens, of either the queries or the keys: cosines
and sines are read once for the heads of a block. Both halves of a pair are in registers before
either is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...attention import select
from ...errors import UnsupportedError
from ...kernels import dependent
from ...kernels.dependent import await_kernels_before
from .launch import launch
from .norm_common import DTYPES, on_device_of, refuse_gradients

SPACE: dict[str, tuple[int, ...]] = {
    "tokens": (1, 2, 4, 8, 16, 32),
    "heads": (1, 2, 4, 8, 16),
    "warps": (1, 2, 4, 8),
}


def _width(rotary_dim: int) -> int:
    return triton.next_power_of_2(rotary_dim // 2)


def default(tokens: int, heads: int, rotary_dim: int, device: torch.device) -> dict[str, int]:
    """Parameters of an untuned call on B * S tokens of H query heads: 8 pairs a thread."""
    block = _width(rotary_dim)
    params = {"tokens": 1, "heads": min(8, triton.next_power_of_2(heads)), "warps": 1}
    programs = tokens * triton.cdiv(heads, params["heads"])
    enough = 8 * select.multiprocessors(device)

    def pairs() -> int:
        return params["tokens"] * params["heads"] * block

    while params["tokens"] < 32 and (
        pairs() < 32 or (pairs() < 1024 and programs // (2 * params["tokens"]) >= enough)
    ):
        params["tokens"] *= 2
    params["warps"] = min(8, max(1, pairs() // 256))
    return params


def fits(params: dict[str, int], rotary_dim: int, *, shared_memory: int) -> bool:
    """Whether a block of pairs stays in registers and every thread has a pair of its own.

    Threads that shared one could read, in place, what the other has already written.
    """
    block, threads = _width(rotary_dim), 32 * params["warps"]
    pairs = params["tokens"] * params["heads"] * block
    # Cosines and sines change threads.
    return threads <= pairs <= 32 * threads and 4 * params["tokens"] * block <= shared_memory


@triton.jit
def _rotate(x_ptr, x_b, x_s, x_h, batches, places, heads, cols, inside, cos_1, sin_1, cos_2, sin_2,
            HALF: tl.constexpr):  # fmt: skip
    token_ptrs = x_ptr + batches * x_b + places * x_s
    ptrs = token_ptrs[:, None, None] + (heads * x_h)[None, :, None] + cols[None, None, :]
    a = tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(ptrs + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(ptrs, (a * cos_1 - b * sin_1).to(x_ptr.dtype.element_ty), mask=inside)
    tl.store(ptrs + HALF, (b * cos_2 + a * sin_2).to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _factors(ptr, stride_b, stride_s, batches, places, cols, inside):
    ptrs = (ptr + batches * stride_b + places * stride_s)[:, None] + cols[None, :]
    return tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)[:, None, :]


@triton.jit
def rotary_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, n_tokens, seq_len, q_heads, k_heads, q_chunks,
    q_b, q_s, q_h, k_b, k_s, k_h, cos_b, cos_s, sin_b, sin_s,
    HALF: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The grid is (blocks of tokens of all batches, blocks of query heads, then of key heads)."""
    await_kernels_before(DEPENDENT)
    chunk = tl.program_id(1)
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    batches = tokens // seq_len
    places = tokens % seq_len
    cols = tl.arange(0, BLOCK)
    lane = tl.arange(0, HEADS)
    seen = (tokens < n_tokens)[:, None] & (cols < HALF)[None, :]
    cos_1 = _factors(cos_ptr, cos_b, cos_s, batches, places, cols, seen)
    cos_2 = _factors(cos_ptr + HALF, cos_b, cos_s, batches, places, cols, seen)
    sin_1 = _factors(sin_ptr, sin_b, sin_s, batches, places, cols, seen)
    sin_2 = _factors(sin_ptr + HALF, sin_b, sin_s, batches, places, cols, seen)
    if chunk < q_chunks:
        heads = (chunk * HEADS + lane).to(tl.int64)
        inside = seen[:, None, :] & (heads < q_heads)[None, :, None]
        _rotate(q_ptr, q_b, q_s, q_h, batches, places, heads, cols, inside,
                cos_1, sin_1, cos_2, sin_2, HALF)  # fmt: skip
    else:
        heads = ((chunk - q_chunks) * HEADS + lane).to(tl.int64)
        inside = seen[:, None, :] & (heads < k_heads)[None, :, None]
        _rotate(k_ptr, k_b, k_s, k_h, batches, places, heads, cols, inside,
                cos_1, sin_1, cos_2, sin_2, HALF)  # fmt: skip


def rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    params: dict[str, int] | None = None,
) -> None:
    """Rotate queries and keys in place: x = x * cos + rotate_half(x) * sin, as Transformers does.

    Args:
        q: [B, S, H, D], fp16, bf16 or fp32, any strides whose last one is 1: a view of a packed
            projection, say.
        k: [B, S, Hkv, D], likewise, q's dtype.
        cos: [B or 1, S, R], R even and at most D, any float dtype; the elements of a head from R
            on stay as they are.
        sin: likewise.
        params: of `SPACE`, for which `fits` holds; `default` chooses otherwise.

    Raises:
        UnsupportedError: a dtype, shape, stride or device that is none of the above; a tensor
            that needs a gradient.

    Example:
        >>> q, k, v = qkv.view(batch, seq_len, 3, heads, dim).unbind(2)  # doctest: +SKIP
        >>> rotary(q, k, cos, sin)  # doctest: +SKIP
    """
    refuse_gradients(q, k, cos, sin)
    _check(q, k, cos, sin)
    batch, seq_len, heads, _ = q.shape
    half = cos.shape[2] // 2
    params = params or default(batch * seq_len, heads, 2 * half, q.device)
    q_chunks, k_chunks = (triton.cdiv(x.shape[2], params["heads"]) for x in (q, k))
    grid = (triton.cdiv(batch * seq_len, params["tokens"]), q_chunks + k_chunks)
    if 0 in grid or half == 0:
        return
    factors = [(x.stride(0) if len(x) == batch else 0, x.stride(1)) for x in (cos, sin)]
    with on_device_of(q):
        launch(
            rotary_kernel, grid,
            q, k, cos, sin, batch * seq_len, seq_len, heads, k.shape[2], q_chunks,
            *q.stride()[:3], *k.stride()[:3], *factors[0], *factors[1],
            HALF=half, BLOCK=_width(2 * half), TOKENS=params["tokens"], HEADS=params["heads"],
            num_warps=params["warps"], **dependent.options(q.device),
        )  # fmt: skip


def _check(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise UnsupportedError(
            f"shapes do not fit: query {list(q.shape)}, key {list(k.shape)}; expected "
            "[B, S, H, D] and [B, S, Hkv, D]: transpose(1, 2) brings heads behind tokens"
        )
    if q.dtype not in DTYPES or k.dtype != q.dtype:
        raise UnsupportedError(
            f"query is {q.dtype}, key {k.dtype}: use float16, bfloat16 or float32 for both"
        )
    for name, x in (("query", q), ("key", k), ("cos", cos), ("sin", sin)):
        if x.device != q.device:
            raise UnsupportedError(f"{name} is on {x.device}, the query on {q.device}: move it")
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise UnsupportedError(f"{name} has gaps between a head's elements: make it contiguous")
    batch, seq_len, _, dim = q.shape
    if (
        cos.shape != sin.shape or cos.ndim != 3 or cos.shape[0] not in (1, batch)
        or cos.shape[1] != seq_len or cos.shape[2] > dim or cos.shape[2] % 2
        or not (cos.is_floating_point() and sin.is_floating_point())
    ):  # fmt: skip
        raise UnsupportedError(
            f"cos and sin must be floats [1 or {batch}, {seq_len}, R], R even and at most {dim}, "
            f"not {cos.dtype} {list(cos.shape)} and {sin.dtype} {list(sin.shape)}"
        )
