"""The implementations that are compared: context managers that yield one attention call."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .masks import BenchMask

__all__ = ["CONTESTANTS", "Cell", "Contestant", "Problem"]

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Cell:
    """One point of the grid; heads is the number of query heads, dtype a name such as "float16"."""

    mask: str
    batch: int
    heads: int
    kv_heads: int
    seq_len: int
    head_dim: int
    dtype: str

    def __str__(self) -> str:
        h = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        return f"{self.mask} B={self.batch} H={h} S={self.seq_len} D={self.head_dim} {self.dtype}"


@dataclass(frozen=True)
class Problem:
    """A cell with its tensors: q [B, H, S, D], k and v [B, Hkv, S, D]."""

    cell: Cell
    mask: BenchMask
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @classmethod
    def make(cls, cell: Cell, mask: BenchMask, device: torch.device) -> Problem:
        draw = torch.Generator(device).manual_seed(0)
        dtype = getattr(torch, cell.dtype)

        def normal(heads: int) -> torch.Tensor:
            shape = (cell.batch, heads, cell.seq_len, cell.head_dim)
            return torch.randn(shape, generator=draw, device=device).to(dtype)

        return cls(cell, mask, normal(cell.heads), normal(cell.kv_heads), normal(cell.kv_heads))

    @property
    def device(self) -> torch.device:
        return self.q.device

    def expanded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v with one head per query head."""
        groups = self.cell.heads // self.cell.kv_heads
        return tuple(t.repeat_interleave(groups, 1) for t in (self.k, self.v))  # type: ignore

    def reference(self) -> torch.Tensor:
        """softmax(q k^T / sqrt(D)) v in fp32, [B, H, S, D], in strips of at most 2**27 scores."""
        cell, out = self.cell, torch.empty(self.q.shape, device=self.device)
        step = max(1, 2**27 // (cell.heads * cell.seq_len))
        for start in range(0, cell.seq_len, step):
            stop = min(start + step, cell.seq_len)
            allowed = self.mask.rows(start, stop, self.device)
            for b in range(cell.batch):
                q = self.q[b, :, start:stop].float().unflatten(0, (cell.kv_heads, -1))
                scores = q @ self.k[b].float().mT[:, None] * cell.head_dim**-0.5
                scores = scores.masked_fill_(~allowed, -torch.inf).softmax(-1)
                out[b, :, start:stop] = (scores @ self.v[b].float()[:, None]).flatten(0, 1)
        return out


@dataclass(frozen=True)
class Contestant:
    """prepare(problem, mask) yields the call, whose result is [B, H, S, D].

    build(problem) makes the mask object that prepare gets; its time is the mask build time.
    unavailable(cell, device) says why a cell is not for this contestant, or None.
    """

    name: str
    prepare: Callable[[Problem, Any], AbstractContextManager[Call]]
    unavailable: Callable[[Cell, torch.device], str | None]
    build: Callable[[Problem], Any] | None = None
    compiled: bool = False


@contextmanager
def _sdpa_mask(p: Problem, mask: torch.Tensor) -> Iterator[Call]:
    k, v = p.expanded()
    yield lambda: F.scaled_dot_product_attention(p.q, k, v, attn_mask=mask)


@contextmanager
def _sdpa_fused(p: Problem, mask: None, *, backend: SDPBackend) -> Iterator[Call]:
    options = {"is_causal": p.mask.name == "causal"}
    options["enable_gqa"] = p.cell.heads != p.cell.kv_heads
    with sdpa_kernel(backend):
        yield lambda: F.scaled_dot_product_attention(p.q, p.k, p.v, **options)


def _block_mask(p: Problem, *, block_size: int) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    s = p.cell.seq_len
    return create_block_mask(p.mask.mod, None, None, s, s, device=p.device, BLOCK_SIZE=block_size)


@contextmanager
def _flex(p: Problem, mask: Any, *, options: dict[str, Any]) -> Iterator[Call]:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    gqa = p.cell.heads != p.cell.kv_heads
    yield lambda: compiled(
        p.q, p.k, p.v, block_mask=mask, enable_gqa=gqa, kernel_options=dict(options)
    )


def first_result(result: Any) -> torch.Tensor:
    """The output of a function that may return its log-sum-exp beside it."""
    return result[0] if isinstance(result, tuple) else result


@contextmanager
def _fa4(p: Problem, mask: None) -> Iterator[Call]:
    from flash_attn.cute.interface import flash_attn_func, flash_attn_varlen_func

    q, k, v = (t.transpose(1, 2).contiguous() for t in (p.q, p.k, p.v))
    if p.mask.lengths is None:
        window = p.mask.window or (None, None)
        yield lambda: first_result(
            flash_attn_func(q, k, v, causal=p.mask.name == "causal", window_size=window)
        ).transpose(1, 2)
        return
    ends = list(accumulate(p.mask.lengths * p.cell.batch))
    cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32, device=p.device)
    longest = max(p.mask.lengths)
    packed = [t.flatten(0, 1) for t in (q, k, v)]
    yield (
        lambda: (
            first_result(
                flash_attn_varlen_func(
                    *packed,
                    cu_seqlens_q=cu_seqlens,
                    cu_seqlens_k=cu_seqlens,
                    max_seqlen_q=longest,
                    max_seqlen_k=longest,
                    causal=True,
                )
            )
            .unflatten(0, (p.cell.batch, -1))
            .transpose(1, 2)
        )
    )


def _sparse_mask(p: Problem) -> Any:
    from stof_hf import SparseMask, patterns

    s, name = p.cell.seq_len, p.mask.name
    if name == "bigbird":
        return SparseMask.from_function(p.mask.mod, s, device=p.device)
    if name == "full":
        pattern = patterns.Full()
    elif name == "causal":
        pattern = patterns.Causal()
    elif name == "sliding":
        pattern = patterns.SlidingWindow(*p.mask.window)
    elif name == "longformer":
        middle = s // 2
        pattern = patterns.Longformer(32, (*range(32), *range(middle, middle + 32)))
    else:
        ids = torch.repeat_interleave(torch.tensor(p.mask.lengths))
        pattern = patterns.Documents(ids) & patterns.Causal()
    return SparseMask.from_pattern(pattern, s, device=p.device)


@contextmanager
def _stof(p: Problem, mask: Any) -> Iterator[Call]:
    from stof_hf import attention

    yield lambda: attention(p.q, p.k, p.v, mask)


def _always(cell: Cell, device: torch.device) -> None:
    return None


NO_FLASH_ATTN = "flash-attn-4 is not installed: pip install it, or name --contestants without it"
#: Why a cell is not for a contestant, where nothing is missing.
NO_SUCH_MASK, CUDA_ONLY, HALF_ONLY = "takes no such mask", "CUDA only", "fp16 and bf16 only"


def _dense_only(cell: Cell, device: torch.device) -> str | None:
    return None if cell.mask in ("full", "causal") else NO_SUCH_MASK


def _needs_cuda(cell: Cell, device: torch.device) -> str | None:
    return None if device.type == "cuda" else CUDA_ONLY


def _cudnn(cell: Cell, device: torch.device) -> str | None:
    return _needs_cuda(cell, device) or _dense_only(cell, device)


def _needs_flash_attn(cell: Cell, device: torch.device) -> str | None:
    if (reason := _needs_cuda(cell, device)) is not None:
        return reason
    if cell.dtype == "float32":
        return HALF_ONLY
    return missing_flash_attn()


def missing_flash_attn() -> str | None:
    """NO_FLASH_ATTN, or None where it is installed."""
    found = importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute")
    return None if found else NO_FLASH_ATTN


def _fa4_masks(cell: Cell, device: torch.device) -> str | None:
    if cell.mask not in ("full", "causal", "sliding", "document"):
        return NO_SUCH_MASK
    return _needs_flash_attn(cell, device)


def _flex_contestant(name: str, block_size: int, needs: Any, **options: Any) -> Contestant:
    build = partial(_block_mask, block_size=block_size)
    return Contestant(name, partial(_flex, options=options), needs, build, compiled=True)


CONTESTANTS: dict[str, Contestant] = {
    c.name: c
    for c in (
        Contestant("sdpa_mask", _sdpa_mask, _always, lambda p: p.mask.dense(p.device)),
        Contestant(
            "sdpa_flash",
            partial(_sdpa_fused, backend=SDPBackend.FLASH_ATTENTION),
            _dense_only,
        ),
        Contestant("sdpa_cudnn", partial(_sdpa_fused, backend=SDPBackend.CUDNN_ATTENTION), _cudnn),
        _flex_contestant("flex_triton", 128, _needs_cuda),
        _flex_contestant("flex_triton64", 64, _needs_cuda, BLOCK_M=64, BLOCK_N=64),
        _flex_contestant("flex_flash", 128, _needs_flash_attn, BACKEND="FLASH"),
        Contestant("fa4_native", _fa4, _fa4_masks, compiled=True),
        Contestant("stof", _stof, _always, _sparse_mask),
    )
}
