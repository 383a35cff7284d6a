"""Linear layer, or the front of a gated MLP, of many rows: operands and results by TMA (Hopper).

A block a multiprocessor walks tiles. The loop over tiles and the one over K are one for Triton's
pipeline (`flatten`), so that the first operands of a tile are loaded while the tile in front of it
is finished. Bounds are in the descriptors: operands beyond them are zeros, results are not stored.

Descriptors are made on the host and travel in the kernel's parameters. Made in the kernel, they
would need memory of an allocator that is the user's to set (triton.set_allocator), an allocation a
launch, and a descriptor written and fenced before a block's first load. `launch.Prepared` puts in
those of a call's tensors; a CUDA graph keeps them as it keeps the other parameters.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ...attention.select import multiprocessors, shared_memory
from ...errors import UnsupportedError
from . import common
from .common import activate, dot, tile_of
from .launch import launch
from .overflow import clamp as clamp_flagged
from .overflow import flags_for, overflowed
from .tma import describes

__all__ = ["SPACE", "default", "fits", "gemm_tma"]

#: As of any GEMM; halves: parts of a tile that pass shared memory one after the other.
SPACE: dict[str, tuple[int, ...]] = {
    "block_m": (64, 128, 256),
    "block_n": (64, 128, 256),
    "block_k": (32, 64, 128),
    "group_m": (4, 8, 16),
    "warps": (4, 8),
    "stages": (2, 3, 4, 5, 6),
    "halves": (1, 2),
}
_DTYPES = (torch.float16, torch.bfloat16)
#: Bytes of shared memory that barriers take, and the bias on its way to the threads that add it.
_BESIDES = 2048
#: Rows, columns of accumulators and warps of the tiles that `default` chooses from.
_TILES = ((64, 128, 4), (128, 128, 8), (128, 256, 8), (256, 128, 8))
#: Stages and halves, best first.
_DEPTHS = ((4, 1), (4, 2), (3, 1), (3, 2), (2, 2))


@triton.jit
def finish(acc, up, bias_ptr, residual, out, row, column, n, ACT: tl.constexpr, BIAS: tl.constexpr,
           RESIDUAL: tl.constexpr, GATE: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Store [BM, BN] of the result, whose first element is (row, column), and return it."""
    if BIAS:
        columns = column + tl.arange(0, BN)
        acc += tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    acc = activate(acc, ACT)
    if GATE:
        acc *= up
    if RESIDUAL:
        acc += residual.load([row, column]).to(tl.float32)
    acc = acc.to(out.dtype)
    out.store([row, column], acc)
    return acc


@triton.jit
def overflowed_at(x, row, column, m, n, BM: tl.constexpr, BN: tl.constexpr):
    """[BM], likewise: 1 for each row that overflowed."""
    rows, columns = row + tl.arange(0, BM), column + tl.arange(0, BN)
    return overflowed(x, (rows < m)[:, None] & (columns < n)[None, :])


@triton.jit
def in_halves(acc, BM: tl.constexpr, BN: tl.constexpr):
    """The left BN columns and the right ones."""
    return tl.split(tl.permute(tl.reshape(acc, [BM, 2, BN]), [0, 2, 1]))


@triton.jit
def weight_tile(w, column, start, GATE: tl.constexpr, TRANSPOSED: tl.constexpr, BN: tl.constexpr,
                BK: tl.constexpr):  # fmt: skip
    """[BK, BN] of a weight that lies as [N, K] or as [K, N]; of [2, N, K], [BK, 2 BN]."""
    if TRANSPOSED:
        return w.load([start, column])
    elif GATE:
        # One load and one product: ptxas serialises two in a flattened loop.
        return tl.reshape(w.load([0, column, start]), [2 * BN, BK]).T
    else:
        return w.load([column, start]).T


@triton.jit
def gemm_tma_kernel(
    x, w, bias_ptr, residual, out, flag_ptr, m, n, k,
    ACT: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATE: tl.constexpr,
    TRANSPOSED: tl.constexpr, CLAMP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, GROUP_M: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Tiles of act(x @ w^T + bias) + residual, or of a gated product: every num_programs-th."""
    blocks = tl.num_programs(0)
    rows, columns = tl.cdiv(m, BM), tl.cdiv(n, BN)
    # Else ptxas may serialise wgmma: see gemm_kernel.
    tl.assume(k > 0)
    # Counted by itself: the pipeline is with the next tile when this one is stored.
    stored = tl.program_id(0)
    for pid in tl.range(tl.program_id(0), rows * columns, blocks, flatten=True):
        tile_m, tile_n = tile_of(pid, rows, columns, GROUP_M)
        acc = tl.zeros([BM, BN * (1 + GATE)], tl.float32)
        for step in range(tl.cdiv(k, BK)):
            a = x.load([tile_m * BM, step * BK])
            b = weight_tile(w, tile_n * BN, step * BK, GATE, TRANSPOSED, BN, BK)
            acc = dot(a, b, acc)
        tile_m, tile_n = tile_of(stored, rows, columns, GROUP_M)
        row, column = tile_m * BM, tile_n * BN
        up = acc
        if GATE:
            acc, up = in_halves(acc, BM, BN)
        if HALVES == 1:
            y = finish(acc, up, bias_ptr, residual, out, row, column, n, ACT, BIAS, RESIDUAL, GATE,
                       BN)  # fmt: skip
            if CLAMP:
                found = overflowed_at(y, row, column, m, n, BM, BN)
        else:
            left, right = in_halves(acc, BM, BN // 2)
            up_left, up_right = in_halves(up, BM, BN // 2)
            y = finish(left, up_left, bias_ptr, residual, out, row, column, n, ACT, BIAS, RESIDUAL,
                       GATE, BN // 2)  # fmt: skip
            if CLAMP:
                found = overflowed_at(y, row, column, m, n, BM, BN // 2)
            column += BN // 2
            y = finish(right, up_right, bias_ptr, residual, out, row, column, n, ACT, BIAS,
                       RESIDUAL, GATE, BN // 2)  # fmt: skip
            if CLAMP:
                found |= overflowed_at(y, row, column, m, n, BM, BN // 2)
        if CLAMP:
            tl.store(flag_ptr + stored, tl.max(found, 0))
        stored += blocks


def default(
    m: int, n: int, k: int, dtype: torch.dtype, device: torch.device, *, gate: bool = False,
    residual: bool = False,
) -> dict[str, int]:  # fmt: skip
    """Parameters for a product [m, k] x [k, n], or two side by side (gate), that nobody tuned."""
    processors, memory = multiprocessors(device), shared_memory(device)
    best: tuple[int, dict[str, int]] | None = None
    for block_m, columns, warps in _TILES:
        for stages, halves in _DEPTHS:
            params = {
                "block_m": block_m, "block_n": columns // (1 + gate), "block_k": 64, "group_m": 8,
                "warps": warps, "stages": stages, "halves": halves,
            }  # fmt: skip
            if fits(params, dtype, shared_memory=memory, gate=gate, residual=residual):
                waves = triton.cdiv(common.tiles_of(m, n, params), processors)
                cost = waves * common.cost_of(block_m, columns)
                if best is None or cost < best[0]:
                    best = cost, params
                break
    assert best is not None
    return best[1]


def fits(
    params: dict[str, int], dtype: torch.dtype, *, shared_memory: int, gate: bool = False,
    residual: bool = False,
) -> bool:  # fmt: skip
    """Whether the kernel compiles with these parameters and fits into this many bytes.

    Args:
        gate: as in `gemm_tma`. residual: whether one is added, whose part of a tile is loaded too.
    """
    rows, columns = params["block_m"], params["block_n"] * (1 + gate)
    stage = (rows + columns) * params["block_k"] * dtype.itemsize
    part = rows * params["block_n"] // params["halves"] * dtype.itemsize
    taken = params["stages"] * stage + part * (1 + residual) + _BESIDES
    in_registers = common.accumulators_fit(rows * columns, params, dtype)
    # Four warps multiply 64 rows. More would share columns, of which halves then change threads.
    of_rows = rows >= 16 * params["warps"]
    return dtype in _DTYPES and in_registers and of_rows and taken <= shared_memory


def gemm_tma(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    activation: str = "none",
    gate: bool = False,
    clamp: bool = False,
    params: dict[str, int] | None = None,
) -> torch.Tensor:
    """act(x @ w^T + bias) + residual, accumulated in fp32 and rounded once.

    Args:
        x: [M, K], fp16 or bf16.
        w: [N, K]; a Conv1D weight [K, N] is passed as `weight.t()`.
        bias: [N] or None.
        residual: [M, N] or None; added after the activation.
        activation: as in `gemm`.
        gate: w is [2 N, K], gate and up, and the result act(x @ gate^T) * (x @ up^T), without bias
            and residual.
        clamp: as in `gemm`.
        params: one value of SPACE each (block_n: columns of the result); None takes `default`.

    Matrices lie in memory as TMA reads and writes them: the elements of a row, or of a column of w,
    side by side, addresses and the distances between rows multiples of 16 bytes. So N is a multiple
    of 8.

    Returns:
        [M, N], contiguous, x's dtype.

    Raises:
        UnsupportedError: shapes, dtypes or devices that do not fit each other, memory that TMA
            does not read, an unknown activation, or tensors that require grad.

    Example:
        >>> with torch.no_grad():                                                 # doctest: +SKIP
        ...     y = gemm_tma(x, linear.weight, linear.bias, activation="gelu")
    """
    m, k = x.shape if x.ndim == 2 else (0, 0)
    n = w.shape[0] // (1 + gate)
    common.check(
        x, {"w": (w, (n * (1 + gate), k)), "bias": (bias, (n,)), "residual": (residual, (m, n))},
        activation, clamp,
    )  # fmt: skip
    _check(x, w, n, residual)
    adds, transposed = residual is not None, w.stride(1) != 1
    if gate and (transposed or adds or bias is not None):
        raise UnsupportedError(
            "gate takes rows of nn.Linear, no bias and no residual: use gated or gemm"
        )
    params = params or default(m, n, k, x.dtype, x.device, gate=gate, residual=adds)
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    bias = None if bias is None else bias.contiguous()
    block_m, block_n, block_k = (params[name] for name in ("block_m", "block_n", "block_k"))
    if transposed:
        weight = _tiles(w.t(), block_k, block_n)
    elif gate:
        weight = _tiles(w.unflatten(0, (2, n)), 2, block_n, block_k)
    else:
        weight = _tiles(w, block_n, block_k)
    part = block_m, block_n // params["halves"]
    tiles = common.tiles_of(m, n, params)
    flags = flags_for(x, tiles) if clamp else None
    with common.on_device_of(x):
        launch(
            gemm_tma_kernel, (min(tiles, multiprocessors(x.device)),),
            _tiles(x, block_m, block_k), weight, bias, _tiles(residual, *part) if adds else None,
            _tiles(out, *part), flags, m, n, k,
            activation, bias is not None, adds, gate, transposed, clamp, block_m, block_n, block_k,
            params["group_m"], params["halves"],
            num_warps=params["warps"], num_stages=params["stages"],
        )  # fmt: skip
        if clamp:
            clamp_flagged(out, flags)
    return out


def _tiles(x: torch.Tensor, *tile: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x, list(tile))


def _check(x: torch.Tensor, w: torch.Tensor, n: int, residual: torch.Tensor | None) -> None:
    """Refuse what TMA cannot load or store."""
    if x.dtype not in _DTYPES:
        raise UnsupportedError(f"{x.dtype} is not supported: use float16 or bfloat16, or gemm")
    if n % 8:
        raise UnsupportedError(f"{n} columns are no multiple of 8: use gemm")
    common.check_rows("x", x)
    if residual is not None:
        common.check_rows("residual", residual)
    for name, one in {"x": x, "w": w, "residual": residual}.items():
        if one is not None and not describes(one):
            raise UnsupportedError(
                f"{name} {list(one.shape)} at {one.data_ptr():#x} has strides {one.stride()}: TMA "
                f"takes multiples of 16 bytes, pass {name}.contiguous() or use gemm"
            )
