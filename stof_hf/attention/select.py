"""Which kernel computes a call: backend, and row-wise or block-wise."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch

from ..errors import BuildError, StofWarning, UnsupportedError
from ..kernels.cuda_kernels import FAMILIES
from ..masks.sparse_mask import SparseMask
from . import calls
from .dropout import Dropout
from .granules import Layout
from .model import BAND, BandForm, band_us, cudnn_us, launch_us
from .plan import longest_row
from .relative import Bias

#: A view with at most this many queries is decoding: row-wise whatever the mask.
DECODE_ROWS = 16
#: Bytes of keys and values from which on cuDNN reads them in less time than the decode kernel: of
#: 2.15e9 on H200s in 0.4 % less, of 0.54e9 in 0 to 2 % more.
_CUDNN_READS = 1.5e9


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SparseMask | None, *,
    with_lse: bool = True, dropout: Dropout | None = None, **rest: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Run the backend of the tensors' device; see `attention.op` for the arguments.

    Without with_lse the second result may be anything. Of GPU kernels, Triton's take dropout.

    Raises UnsupportedError for devices that no backend serves.
    """
    kind = q.device.type
    if kind == "cuda" and dropout is not None:
        from . import triton

        return triton.forward(q, k, v, mask, dropout=dropout, **rest)
    if kind == "cuda":
        name, prepare = _CALLS[with_lse]
        return calls.forward(name, prepare, q, k, v, mask, **rest)
    if kind == "cpu":
        from . import cpu

        return cpu.forward(q, k, v, mask, dropout=dropout, **rest)
    raise UnsupportedError(
        f"device {q.device} has no stof backend: use a CUDA GPU or the CPU, or "
        'attn_implementation="sdpa"'
    )


def _prepare(
    with_lse: bool, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SparseMask, *rest: Any
) -> Any:
    """The call as CUDA or Triton kernels or PyTorch compute it; see `calls.forward`."""
    *options, on_device = rest
    if use_row_wise(q, q.shape[3], mask):
        call = _prepare_decode(q, k, v, mask, *options, with_lse)
    elif on_device:
        call = None
    else:
        call = _prepare_native(q, k, v, mask, *options, with_lse)
    if call is not None:
        return call
    from . import triton

    return triton.prepare(q, k, v, mask, *rest, with_lse)


_CALLS = {
    True: ("calls", partial(_prepare, True)),
    False: ("calls without lse", partial(_prepare, False)),
}


def _prepare_native(*call: Any) -> Any:
    from . import cuda, cuda_band, sdpa

    return (
        sdpa.prepare(*call)
        or _prepare_cuda(cuda_band.prepare, *call)
        or _prepare_cuda(cuda.prepare, *call)
    )


def _prepare_decode(*call: Any) -> Any:
    from . import cuda_decode, sdpa

    return sdpa.prepare(*call) or _prepare_cuda(cuda_decode.prepare, *call)


def _prepare_cuda(prepare: calls.Prepare, *call: Any) -> Any:
    if _failures:
        return None
    try:
        return prepare(*call)
    except BuildError as error:
        _failures.append(error)
        warnings.warn(
            f"stof_hf: the CUDA kernels cannot be used, the Triton kernels take their place: "
            f"{error}",
            StofWarning,
            stacklevel=2,
        )
        return None


#: Builds that failed in this process: one warning, and no second try.
_failures: list[BuildError] = []


def use_row_wise(q: torch.Tensor, dim: int, mask: SparseMask) -> bool:
    """Whether the row-wise kernel computes this call, for a head size padded to `dim`.

    It does for decoding, and for fp32 heads whose tiles would not fit into shared memory.
    """
    return mask.is_view or q.shape[2] <= DECODE_ROWS or not fits_block_wise(q, dim)


def fits_block_wise(q: torch.Tensor, dim: int) -> bool:
    """Whether tiles of Triton's block-wise kernel fit into shared memory; dim as above."""
    return q.dtype != torch.float32 or dim <= (128 if has_much_shared_memory(q.device) else 64)


@dataclass(frozen=True)
class BlockConfig:
    """Of the block-wise kernel: query rows and warps of a block, pipeline stages, key tiles a step
    of a run of full tiles covers (0: such tiles are listed like the others), the most registers of
    a thread (None: what the compiler likes), and the blocks that the device runs at once."""

    rows: int
    warps: int
    stages: int
    unit: int
    registers: int | None
    workers: int


@dataclass(frozen=True)
class RowConfig:
    """Of the row-wise kernel: query rows of a block, keys of a step, the split over keys, and
    pipeline stages."""

    take: int
    keys: int
    splits: int
    keys_per_split: int
    stages: int


def block_config(q: torch.Tensor, dim: int, runs: float) -> BlockConfig:
    """Tile sizes of the Triton block-wise kernel, measured on an H200.

    Args:
        dim: head size padded to a power of 2.
        runs: share of the mask's tiles that lie in long runs of full ones.
    """
    batch, heads, q_len, _ = q.shape
    processors = multiprocessors(q.device)
    if q.dtype == torch.float32:
        return BlockConfig(64, 4, 2 if dim <= 64 else 1, 0, None, 2 * processors)
    if dim > 128:
        stages = 2 if has_much_shared_memory(q.device) else 1
        return BlockConfig(64, 8, stages, 0, None, processors)
    wide_blocks = batch * heads * (q_len // 128)
    runs = runs if has_much_shared_memory(q.device) else 0.0
    if runs > 0.6 and dim == 128 and wide_blocks >= 4 * processors:
        return BlockConfig(128, 8, 3, 2, None, processors)
    if runs > 0.6 and dim <= 64:
        if wide_blocks >= 8 * processors:
            return BlockConfig(128, 8, 3, 1, 128, 2 * processors)
        return BlockConfig(64, 4, 3, 1, None, 3 * processors)
    if dim == 128:
        return BlockConfig(64, 4, 2, 0, None, 2 * processors)
    if batch * heads * -(-q_len // 64) <= processors:
        return BlockConfig(64, 4, 3, 0, None, 3 * processors)
    return BlockConfig(64, 4, 2, 0, 128, 4 * processors)


@dataclass(frozen=True)
class CudaConfig:
    """Of the CUDA block-wise kernels: how a block's halves are used, whether they are two heads,
    blocks that the device runs at once, and the bytes of keys and values that run together."""

    layout: Layout
    two_heads: bool
    workers: int
    l2_bytes: int = 12 << 20


_LAYOUTS = {"rows": (2, False), "paired": (1, True), "heads": (1, False)}


def cuda_config(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SparseMask) -> CudaConfig:
    """How a CUDA block-wise kernel computes a call in the least time."""
    name, small = _cuda_layout(q, k, mask), max(q.shape[3], v.shape[3]) <= 64
    # One block a multiprocessor has nobody to hide how an item begins and ends behind.
    layout = Layout(*_LAYOUTS[name], *((1.0, 8.0) if small else (5.5, 12.0)))
    return CudaConfig(layout, name == "heads", multiprocessors(q.device) * (2 if small else 1))


def block_kernel(
    families: list[str], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SparseMask,
    bias: Bias | None, softcap: float,
) -> str | None:  # fmt: skip
    """The kernel that computes a call block-wise: one of `families`, or None for Triton's.

    Args:
        families: those of `cuda_kernels` that can compute it.
    """
    if "hopper" in families:
        # The Triton kernel starts sooner, and may end sooner.
        best = _cuda_layout(q, k, mask)
        return None if _predicted("triton", q, mask) < _predicted(best, q, mask) else "hopper"
    # On Hopper GPUs the Triton kernel uses warpgroup products, which the other one does not.
    return "sm80" if "sm80" in families and _capability(q.device)[0] != 9 else None


def band_together(q: torch.Tensor, k: torch.Tensor) -> int:
    """Heads whose blocks the band kernel runs at a time: their keys and values stay in L2."""
    batch, heads = q.shape[:2]
    group = heads // k.shape[1]
    per_head = 2 * k.shape[2] * k.shape[3] * k.itemsize // group
    together = min(batch * heads, (24 << 20) // per_head)
    return together // group * group or max(1, together)


def band_forms(q: torch.Tensor, k: torch.Tensor) -> list[BandForm]:
    """Those in which the band kernel can compute a call."""
    group = q.shape[1] // k.shape[1]
    return [form for form in BAND[q.shape[3] > 64] if group % form.heads == 0]


def band_form(
    q: torch.Tensor, k: torch.Tensor, mask: SparseMask, band: tuple[int, int]
) -> BandForm:
    """The form of the band kernel in which a call takes the least time."""
    return min(band_forms(q, k), key=lambda form: _band_us(form, q, k, mask, band))


def band_is_ahead(
    q: torch.Tensor, k: torch.Tensor, mask: SparseMask, band: tuple[int, int]
) -> bool:
    """Whether the band kernel computes a call in less time than those that read a mask."""
    others = min(_predicted(name, q, mask) for name in ("triton", *_layouts(q, k, mask)))
    return _band_us(band_form(q, k, mask, band), q, k, mask, band) < others


def _band_us(
    form: BandForm, q: torch.Tensor, k: torch.Tensor, mask: SparseMask, band: tuple[int, int]
) -> float:
    batch, heads, q_len, dim = q.shape
    offset, processors = mask.q_offset - mask.kv_offset, multiprocessors(q.device)
    rest = band_together(q, k), dim, processors
    return band_us(form, batch * heads, q_len, k.shape[2], band, offset, *rest)


def cudnn_is_ahead(
    q: torch.Tensor, k: torch.Tensor, mask: SparseMask, causal: bool,
    band: tuple[int, int] | None = None,
) -> bool:  # fmt: skip
    """Whether cuDNN computes a causal mask, or none, in less time than the kernels of this package.

    A single query reads keys and values, and does nothing else that takes time. Causal launches of
    about 0.8 ms and more draw all the power that the GPU may take, of which cuDNN makes more than a
    kernel that reads a mask.

    Args:
        band: of the mask, where the band kernel computes such calls.
    """
    batch, heads, q_len, dim = q.shape
    if use_row_wise(q, dim, mask):
        return q_len == 1 and 2 * k.numel() * k.itemsize >= _CUDNN_READS
    band = None if _failures else band
    if causal:
        return band is None and batch * heads * q_len * k.shape[2] * dim / 64 >= 2.4e9
    theirs = cudnn_us(batch * heads, q_len, k.shape[2], dim, multiprocessors(q.device))
    if band and _band_us(band_form(q, k, mask, band), q, k, mask, band) < theirs:
        return False
    ours = ("triton", *_LAYOUTS) if dim in FAMILIES["hopper"].head_dims else ("triton",)
    try:
        return theirs < min(_predicted(name, q, mask) for name in ours)
    except BuildError:
        # Without the host library nothing is predicted, and the Triton kernels are all there is.
        return True


def _layouts(q: torch.Tensor, k: torch.Tensor, mask: SparseMask) -> list[str]:
    shares_keys = q.shape[1] // k.shape[1] % 2 == 0 and mask.pattern_id.shape[1] == 1
    return [name for name in _LAYOUTS if name != "heads" or shares_keys]


def _cuda_layout(q: torch.Tensor, k: torch.Tensor, mask: SparseMask) -> str:
    return min(_layouts(q, k, mask), key=lambda name: _predicted(name, q, mask))


def _predicted(name: str, q: torch.Tensor, mask: SparseMask) -> float:
    batch, heads, _, dim = q.shape
    processors = multiprocessors(q.device)
    return launch_us(name, mask, batch * heads, dim, q.itemsize, processors)


def row_config(q: torch.Tensor, k: torch.Tensor, dim: int) -> RowConfig:
    """Split of the Triton row-wise kernel: enough programs to fill the device, no piece under 128
    keys, and no more in shared memory than there is.

    Args:
        dim: head size padded to a power of 2.

    Raises UnsupportedError where the heads that share keys do not fit into shared memory.
    """
    batch, heads, q_len, _ = q.shape
    kv_heads, kv_len, group = k.shape[1], k.shape[2], heads // k.shape[1]
    exact, roomy = q.dtype == torch.float32, has_much_shared_memory(q.device)
    take = max(1, min(q_len, (32 if exact and dim > 128 else 64) // group))
    rows = max(16, 1 << (take * group - 1).bit_length())
    # The rows that there is room for anyway: calls of 2 to 16 queries share compiled kernels.
    take = 1 if q_len == 1 else rows // group
    large = dim > 128 or (exact and dim > 64)
    keys = 32 if large and not (roomy and not exact) else 64
    stages = 3 if not large else 2 if roomy else 1
    # Of fp32 queries that warpgroups multiply, the rounded part and the rest. Each further stage
    # holds the tiles that the steps' elements lie in, too: what Triton 3.6 was seen to take.
    queries = rows * dim * q.itemsize * (2 if exact and rows >= 64 else 1)

    def taken() -> int:
        return queries + stages * 2 * keys * dim * q.itemsize + (stages - 1) * rows * keys * 8

    while taken() > shared_memory(q.device):
        if stages > 1:
            stages -= 1
        elif keys > 16:
            keys //= 2
        else:
            raise UnsupportedError(
                f"{group} heads of size {q.shape[3]} that share keys do not fit into shared memory "
                f'as {q.dtype}: use fp16 or bf16, or attn_implementation="sdpa"'
            )
    programs = -(-q_len // take) * batch * kv_heads
    wanted = -(-4 * multiprocessors(q.device) // programs)
    splits = max(1, min(wanted, kv_len // 128, 128))
    keys_per_split = -(-kv_len // splits // keys) * keys
    return RowConfig(take, keys, -(-kv_len // keys_per_split), keys_per_split, stages)


def decode_splits(q: torch.Tensor, k: torch.Tensor, mask: SparseMask) -> int:
    """Into how many pieces the CUDA decode kernel cuts the keys of a row: what ends soonest.

    A block begins and ends in about 2.5 us and computes a tile of 64 keys in 0.44; all blocks
    together read 4.6 TB/s. The pieces of a row are combined by a cluster of up to 8 blocks in about
    1.5 us, by a second kernel in about 3.3 (measured on an H200).
    """
    batch, heads, q_len, dim = q.shape
    group = 1 if len(mask.row_ptr) > 1 and mask.pattern_id.shape[1] > 1 else heads // k.shape[1]
    blocks = batch * (heads // group) * -(-q_len * group // 64)
    tiles, tile_bytes = min(-(-k.shape[2] // 64), longest_row(mask)), 64 * 2 * dim * k.itemsize
    workers = multiprocessors(q.device)
    in_clusters = 8 if _capability(q.device)[0] >= 9 else 1

    def us(splits: int) -> float:
        waves = -(-blocks * splits // workers)
        share = -(-tiles // splits)
        reading = share * tile_bytes * min(blocks * splits, workers) / 4.6e6
        combining = 0.0 if splits == 1 else 1.5 if splits <= in_clusters else 3.3
        return waves * (2.5 + max(0.44 * share, reading)) + combining

    return min(range(1, max(2, min(tiles, 256) + 1)), key=us)


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def has_much_shared_memory(device: torch.device) -> bool:
    """Whether a block of a CUDA device may use the 227 KB of an H100 or H200."""
    return shared_memory(device) >= 227 << 10


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a block of a CUDA device may use; what an H200 has stands in elsewhere."""
    if device.type != "cuda":
        return 227 << 10
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 4 stands in where kernels are interpreted."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
