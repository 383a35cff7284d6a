"""What the GEMM templates share: products, tile order, activations, tile sizes and checks."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
import triton
import triton.language as tl

from ...attention.select import multiprocessors, shared_memory
from ...errors import UnsupportedError
from ...kernels.dependent import fetch
from .prologue import NORMALISING, normalised, statistics, statistics_bytes

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
#: Names of Transformers' ACT2FN, and "none".
ACTIVATIONS = ("none", "relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "silu")
#: What the search samples for any GEMM: tile, tiles walked together, warps, pipeline stages.
SPACE: dict[str, tuple[int, ...]] = {
    "block_m": (16, 32, 64, 128, 256),
    "block_n": (32, 64, 128, 256),
    "block_k": (32, 64, 128),
    "group_m": (1, 4, 8, 16),
    "warps": (4, 8),
    "stages": (2, 3, 4, 5),
}
#: Blocks that run at once, at least.
MOST_FETCHING = tl.constexpr(264)
#: Bytes that a thread's share of a tile may take in the operands' dtype, so that the loop has
#: registers left. Products of fp32 split their operands, which takes more of them.
_THREAD_BYTES = 256
#: Rows, columns and warps of the tiles that `default` chooses from.
_TILES = (
    (16, 64, 4), (32, 32, 4), (32, 64, 4), (64, 64, 4), (128, 64, 4), (128, 128, 8), (128, 256, 8),
)  # fmt: skip


@triton.jit
def activate(x, ACT: tl.constexpr):
    """An activation of fp32 values; tanh(u) is written as 2 sigmoid(2 u) - 1."""
    if ACT == "relu":
        # Unlike a maximum, this keeps NaN.
        x = tl.where(x < 0, 0.0, x)
    elif ACT == "gelu":
        x = 0.5 * x * (1 + tl.math.erf(x * 0.7071067811865476))
    elif ACT == "gelu_new" or ACT == "gelu_pytorch_tanh":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == "quick_gelu":
        x = x * tl.sigmoid(1.702 * x)
    elif ACT == "silu":
        x = x * tl.sigmoid(x)
    return x


@triton.jit
def tile_of(pid, rows, columns, GROUP_M: tl.constexpr):
    """Row and column of a block's tile.

    GROUP_M rows of tiles are walked column by column: blocks that run at the same time read few
    distinct rows of both operands, which stay in L2.
    """
    width = GROUP_M * columns
    first = pid // width * GROUP_M
    height = tl.minimum(rows - first, GROUP_M)
    return first + pid % width % height, pid % width // height


@triton.jit
def dot(a, b, acc):
    # Triton's interpreter computes bf16 products wrongly.
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def weight_pointers(w_ptr, rows, w_n, w_k, BK: tl.constexpr):
    """[BK, rows]: the first elements of these rows of a weight [N, K], transposed."""
    # 64 bits, because a vocabulary or many experts times a hidden size pass 2^31.
    along = tl.arange(0, BK).to(tl.int64) * w_k
    return w_ptr + along[:, None] + (rows.to(tl.int64) * w_n)[None, :]


@triton.jit
def fetch_weights(w_ptr, rows, n, k, w_n, w_k, BN: tl.constexpr, DEPENDENT: tl.constexpr):
    """Has these rows of a weight [N, K] brought nearer, while the kernel in front still runs.

    Where blocks are many, those behind the first find no kernel in front of them any more.
    """
    # In one condition, Triton would make a branch of it on other GPUs too.
    if DEPENDENT:  # noqa: SIM102
        if tl.num_programs(0) <= MOST_FETCHING:
            line = tl.arange(0, 4) * 64
            if w_k == 1:
                starts = w_ptr + tl.minimum(rows, n - 1).to(tl.int64) * w_n
                for start in range(0, k, 256):
                    fetch(starts[:, None] + tl.minimum(start + line, k - 1)[None, :])
            else:
                column = tl.minimum(tl.min(rows, 0) + tl.arange(0, (BN + 31) // 32) * 32, n - 1)
                for start in range(0, k, 32):
                    depth = tl.minimum(start + tl.arange(0, 32), k - 1).to(tl.int64)
                    fetch(w_ptr + (depth * w_k)[:, None] + (column * w_n)[None, :])


@triton.jit
def two_products(x_rows, a_ptrs, b_ptrs, rows_in, columns_in, norm_ptr, shift_ptr, eps, k, a_step,
                 b_step, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                 EVEN_K: tl.constexpr, NORM: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Products of the same rows, normalised or not, with two weight tiles: they are loaded once."""
    # Else ptxas may serialise wgmma: see gemm_kernel.
    tl.assume(k > 0)
    if NORM != "none":
        mean, scale = statistics(x_rows, rows_in, k, eps, BM, CHUNK, NORM)
    x_ptrs = x_rows[:, None] + tl.arange(0, BK)[None, :]
    a_acc = tl.zeros([BM, BN], tl.float32)
    b_acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, k, BK):
        x_in = rows_in[:, None]
        w_in = columns_in[None, :]
        if not EVEN_K:
            k_in = tl.arange(0, BK) < k - start
            x_in = x_in & k_in[None, :]
            w_in = w_in & k_in[:, None]
        x = tl.load(x_ptrs, mask=x_in, other=0.0)
        a = tl.load(a_ptrs, mask=w_in, other=0.0)
        b = tl.load(b_ptrs, mask=w_in, other=0.0)
        if NORM != "none":
            at = start + tl.arange(0, BK)
            x = normalised(x, mean, scale, norm_ptr, shift_ptr, at, k, NORM)
        a_acc = dot(x, a, a_acc)
        b_acc = dot(x, b, b_acc)
        x_ptrs += BK
        a_ptrs += a_step
        b_ptrs += b_step
    return a_acc, b_acc


def fits(
    params: dict[str, int], columns: int, dtype: torch.dtype, shared_memory: int, norm: bool = False
) -> bool:
    """Whether a block with this many columns of accumulators, and a norm or none, fits.

    An upper bound: without wgmma, Triton allocates one stage less.
    """
    block_m, block_k = params["block_m"], params["block_k"]
    stage = (block_m + columns) * block_k * dtype.itemsize
    # The epilogue may pass the whole tile through shared memory.
    tile = block_m * columns * dtype.itemsize
    # What is normalised passes through registers on its way.
    kept = tile + norm * block_m * block_k * dtype.itemsize
    in_registers = kept // (32 * params["warps"]) <= _THREAD_BYTES
    before = statistics_bytes(params, dtype) if norm else 0
    return in_registers and max(params["stages"] * stage, tile, before) <= shared_memory


@lru_cache(maxsize=4096)
def default(
    m: int, n: int, dtype: torch.dtype, device: torch.device, products: int = 1, norm: bool = False
) -> dict[str, int]:
    """Parameters of a GEMM whose blocks compute `products` products of block_n columns each.

    A tile costs what its products take and what loading its operands takes; the tile is taken
    whose waves over the multiprocessors cost least.
    """
    processors, memory = multiprocessors(device), shared_memory(device)
    best: tuple[int, dict[str, int]] | None = None
    for block_m, columns, warps in _TILES:
        # Where little can be computed at once, long steps hide the latency of loads.
        bytes_k = 256 if block_m * columns <= 64 * 64 else 128
        params = {
            "block_m": block_m, "block_n": columns // products,
            "block_k": bytes_k // dtype.itemsize, "group_m": 8, "warps": warps, "stages": 4,
        }  # fmt: skip
        if not fits(params, columns, dtype, memory, norm):
            params["stages"] = 3
        if params["block_n"] not in SPACE["block_n"] or not fits(
            params, columns, dtype, memory, norm
        ):
            continue
        tiles = triton.cdiv(m, block_m) * triton.cdiv(n, params["block_n"])
        waves = triton.cdiv(tiles, processors)
        cost = waves * (block_m * columns + 64 * (block_m + columns))
        cost += waves * NORMALISING * block_m * norm
        if best is None or cost < best[0]:
            best = cost, params
    assert best is not None
    return best[1]


def check(
    x: torch.Tensor,
    weights: dict[str, tuple[torch.Tensor | None, tuple[int, ...]]],
    activation: str = "none",
    clamp: bool = False,
) -> None:
    """Refuse what the templates do not compute; cheap, reads no device memory.

    Args:
        x: activations [M, K].
        weights: name -> (tensor or None, shape that it must have).
        activation: one of ACTIVATIONS.
        clamp: whether the result is clamped where it overflows.
    """
    if x.ndim != 2 or x.shape[1] == 0:
        raise UnsupportedError(
            f"activations are [rows, features >= 1], not {list(x.shape)}: x.flatten(0, -2) makes "
            "rows"
        )
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise UnsupportedError(
            f"dtype {x.dtype} is not supported: use float16, bfloat16 or float32 (model.to(dtype))"
        )
    if clamp and x.dtype != torch.float16:
        raise UnsupportedError(f"only float16 is clamped, activations are {x.dtype}: clamp=False")
    if activation not in ACTIVATIONS:
        raise UnsupportedError(
            f"activation {activation!r} is not supported: use one of {', '.join(ACTIVATIONS)}, or "
            "apply it outside"
        )
    if not x.is_cuda and not INTERPRETED.value:
        raise UnsupportedError(
            f"device {x.device} runs no Triton kernels: move model and inputs to a CUDA GPU"
        )
    grad = x.requires_grad
    for name, (tensor, shape) in weights.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise UnsupportedError(
                f"{name} {list(tensor.shape)} does not fit activations {list(x.shape)}: expected "
                f"{list(shape)}"
            )
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise UnsupportedError(
                f"{name} is {tensor.dtype} on {tensor.device}, activations are {x.dtype} on "
                f"{x.device}: give them one dtype and one device"
            )
        grad = grad or tensor.requires_grad
    if grad and torch.is_grad_enabled():
        raise UnsupportedError(
            "fused templates have no backward: call them under torch.no_grad(), or train with "
            "the model's own layers (stof_hf.restore(model))"
        )


def check_rows(name: str, x: torch.Tensor) -> None:
    """Refuse a matrix whose rows' elements do not lie side by side."""
    if x.stride(1) != 1 and x.shape[1] > 1:
        raise UnsupportedError(
            f"{name} has strides {x.stride()}, the last must be 1: pass {name}.contiguous()"
        )


def on_device_of(x: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, wherever the tensors are."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()
