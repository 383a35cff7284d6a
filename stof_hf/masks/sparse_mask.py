"""SparseMask: a mask as block-sparse rows plus bitmaps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import MaskError
from . import bits
from .as_tensor import ActsAsTensor
from .pattern import Pattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch.nn.attention.flex_attention import BlockMask

FULL, EMPTY = -1, -2
#: Entries of `plans` that hold on every device.
HOST_FACTS = ("host_runs", "host_words", "valid_share")
#: `plans` by `tile_bits`, for masks that travel through torch's dispatcher as bare tensors.
PLANS: WeakIdKeyDictionary = WeakIdKeyDictionary()
STRUCTURE = ("pattern_id", "row_ptr", "run_col", "run_len", "run_bits", "tile_bits")


@dataclass(frozen=True, eq=False, repr=False)
class SparseMask(ActsAsTensor):
    """Who may attend to whom, stored as runs of 64 x 64 tiles and bitmaps. Immutable.

    Level one is block-sparse rows by runs: the runs of tile row t of pattern p are the entries
    `row_ptr[p, t]` to `row_ptr[p, t + 1]` of `run_col` (first tile), `run_len` (tiles) and
    `run_bits` (-1: full; else the length is 1 and the entry indexes level two). Level two is
    `tile_bits`: 64 words a tile, bit c of word r set where row r may attend to column c.
    `pattern_id[b, h]` says which of the P stored patterns a head uses; `kv_valid` holds padding as
    bits of the key sequence.

    Args:
        q_len, kv_len: number of queries and keys, Sq and Sk.
        pattern_id: int32 [Bm, Hm]. row_ptr: int32 [P, ceil(Sq/64) + 1].
        run_col, run_len, run_bits: int32 [R]. tile_bits: int64 [U, 64].
        kv_valid: int64 [B, ceil(Sk/64)] or None (no padding).
        q_offset, kv_offset: absolute position of storage row 0 and column 0.
        row_start, col_start: where the described view begins inside the storage (see `rows`).
        pattern: the pattern it was built from; None where a tensor or BlockMask was, so that the
            mask does not keep them alive.
        plans: what kernels derive from the structure, shared by all views of it.

    >>> from stof_hf.masks.patterns import Causal
    >>> SparseMask.from_pattern(Causal(), 200)
    SparseMask(1x1x200x200, 50.2% kept, 4 tile rows, 7 runs, 2 distinct partial tiles, cpu)
    """

    q_len: int
    kv_len: int
    pattern_id: torch.Tensor
    row_ptr: torch.Tensor
    run_col: torch.Tensor
    run_len: torch.Tensor
    run_bits: torch.Tensor
    tile_bits: torch.Tensor
    kv_valid: torch.Tensor | None = None
    q_offset: int = 0
    kv_offset: int = 0
    row_start: int | torch.Tensor = 0
    col_start: int | torch.Tensor = 0
    pattern: Pattern | None = None
    plans: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def from_pattern(
        cls,
        pattern: Pattern,
        q_len: int,
        kv_len: int | None = None,
        *,
        q_offset: int = 0,
        kv_offset: int = 0,
        padding: torch.Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> SparseMask:
        """Build from a pattern, without ever holding Sq x Sk booleans.

        Args:
            q_len, kv_len: number of queries and keys; kv_len defaults to q_len.
            q_offset, kv_offset: absolute position of the first query and of the first key.
            padding: bool [B, Sk], True at real keys.
            device: where the mask is stored. Closed-form patterns never synchronise with it.

        Raises MaskError for lengths below 1 or a pattern that does not fit them.
        """
        from .build import build

        return build(pattern, q_len, kv_len, q_offset, kv_offset, padding, torch.device(device))

    @classmethod
    def from_function(
        cls,
        function: Callable[..., torch.Tensor],
        q_len: int,
        kv_len: int | None = None,
        *,
        batch: int | None = None,
        heads: int | None = None,
        **kwargs: Any,
    ) -> SparseMask:
        """Build from a mask function f(b, h, q, k) -> bool, evaluated tile by tile on `device`.

        Args:
            batch, heads: number of different masks, if the function reads b or h.
            kwargs: as for `from_pattern`.
        """
        from .patterns import Custom

        return cls.from_pattern(Custom(function, batch, heads), q_len, kv_len, **kwargs)

    @classmethod
    def from_dense(cls, mask: torch.Tensor, *, padding: torch.Tensor | None = None) -> SparseMask:
        """Build from a bool tensor [Sq, Sk] or [B or 1, H or 1, Sq, Sk], on its device.

        >>> import torch
        >>> dense = torch.rand(1, 2, 70, 90) < 0.1
        >>> bool((SparseMask.from_dense(dense).to_dense() == dense).all())
        True
        """
        from .build import build_dense

        return build_dense(mask, padding)

    @classmethod
    def from_block_mask(cls, block_mask: BlockMask) -> SparseMask:
        """Build from a FlexAttention BlockMask, on its device; equal to it element by element."""
        from .build import build_block_mask

        return build_block_mask(block_mask)

    @classmethod
    def from_coo(cls, coo: torch.Tensor) -> SparseMask:
        """Build from a sparse bool COO tensor [Sq, Sk] or [B or 1, H or 1, Sq, Sk]."""
        from .build import build_coo

        return build_coo(coo)

    @property
    def shape(self) -> torch.Size:
        batch, heads = self.pattern_id.shape
        if self.kv_valid is not None:
            batch = max(batch, self.kv_valid.shape[0])
        return torch.Size((batch, heads, self.q_len, self.kv_len))

    @property
    def ndim(self) -> int:
        return 4

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    @property
    def device(self) -> torch.device:
        return self.pattern_id.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.bool

    @property
    def is_view(self) -> bool:
        """Whether the mask describes a part of its storage (made by `rows`)."""
        return not (_is_zero(self.row_start) and _is_zero(self.col_start))

    def contiguous(self) -> SparseMask:
        return self

    def to(self, device: Any, *args: Any, **kwargs: Any) -> SparseMask:
        """The mask on another device, its structure copied once. A dtype is ignored."""
        if isinstance(device, torch.dtype):
            return self
        device = torch.device(device)
        if device == self.device or (device.type == self.device.type and device.index is None):
            return self
        key = ("structure", device)
        if key not in self.plans:
            moved = {name: getattr(self, name).to(device) for name in STRUCTURE}
            known = {name: self.plans[name] for name in HOST_FACTS if name in self.plans}
            self.plans[key] = (moved, known)
            PLANS[moved["tile_bits"]] = known
        moved, plans = self.plans[key]

        def carry(x: Any) -> Any:
            return x.to(device) if isinstance(x, torch.Tensor) else x

        of_view = ("kv_valid", "row_start", "col_start")
        views = {name: carry(getattr(self, name)) for name in of_view}
        return replace(self, **moved, **views, plans=plans)

    def with_padding(self, valid: torch.Tensor | None) -> SparseMask:
        """The same mask for a batch with padding; shares everything else. Does not synchronise.

        Args:
            valid: bool or integer [B, Sk], true at real keys, or None for no padding.

        Raises MaskError for another shape or for floats.
        """
        return self.with_words(None if valid is None else self._padding_words(valid))

    def with_words(self, kv_valid: torch.Tensor | None) -> SparseMask:
        """`with_padding` for padding that is packed already: int64 [B, ceil(Sk/64)] or None."""
        return replace(self, kv_valid=kv_valid)

    def _padding_words(self, valid: torch.Tensor) -> torch.Tensor:
        if valid.ndim != 2 or valid.shape[1] != self.kv_len:
            raise MaskError(
                f"padding must be [batch, {self.kv_len}] to fit the mask's keys, not "
                f"{list(valid.shape)}: pad or cut the attention mask to the number of keys"
            )
        if valid.is_floating_point():
            raise MaskError(
                f"padding must be booleans, True at real keys, not {valid.dtype}: of an additive "
                "mask, give padding == 0"
            )
        batch = self.pattern_id.shape[0]
        if batch != 1 and valid.shape[0] not in (1, batch):
            raise MaskError(
                f"padding is for a batch of {valid.shape[0]}, the mask for {batch}: one of them "
                "must be 1, or both the same"
            )
        return bits.pack(valid.to(self.device, torch.bool))

    def rows(
        self,
        start: int | torch.Tensor,
        q_len: int,
        kv_len: int,
        col_start: int | torch.Tensor = 0,
    ) -> SparseMask:
        """The part of the mask that a decode step needs, with nothing built or copied.

        Query i of the view is storage row start + i, key j is storage column col_start + j.

        Args:
            start, col_start: int, or an int64 tensor with one element on the mask's device, which
                is read by the kernel only: no synchronisation.
            q_len, kv_len: queries and keys of the view.

        Raises MaskError where ints show that the view does not fit the mask.
        """
        if self.is_view:
            raise MaskError("rows() of a view: take them from the mask that the view was made of")
        for name, begin, length, limit in (
            ("queries", start, q_len, self.q_len), ("keys", col_start, kv_len, self.kv_len),
        ):  # fmt: skip
            begin = begin if isinstance(begin, int) else 0
            if begin < 0 or length < 1 or begin + length > limit:
                raise MaskError(
                    f"{name} {begin} to {begin + length} do not lie in a mask of {limit} {name}: "
                    "build the mask for a longer sequence"
                )
        smaller = (q_len, kv_len) != (self.q_len, self.kv_len)
        if smaller and _is_zero(start) and _is_zero(col_start):
            # Two ints of 0 say that storage and mask end together, which full tiles rely on.
            start = torch.zeros(1, dtype=torch.int64, device=self.device)
        return replace(
            self, q_len=q_len, kv_len=kv_len, row_start=start, col_start=col_start, kv_valid=None
        )

    def host_runs(self) -> tuple[np.ndarray, ...]:
        """row_ptr, run_col, run_len and run_bits as int64 arrays on the host; see `host_arrays`."""
        return tuple(x.astype(np.int64) for x in self._host_runs())

    def host_arrays(self) -> tuple[np.ndarray, ...]:
        """row_ptr, run_col, run_len, run_bits (int32) and tile_bits (uint64) on the host.

        Builders leave them with the mask; otherwise they are copied once, with a synchronisation.
        """
        if "host_words" not in self.plans:
            self.plans["host_words"] = self.tile_bits.cpu().numpy().view(np.uint64)
        return *self._host_runs(), self.plans["host_words"]

    def _host_runs(self) -> tuple[np.ndarray, ...]:
        if "host_runs" not in self.plans:
            runs = (self.row_ptr, self.run_col, self.run_len, self.run_bits)
            self.plans["host_runs"] = tuple(x.cpu().numpy() for x in runs)
        return self.plans["host_runs"]

    def to_dense(self) -> torch.Tensor:
        """bool [B, Hm, Sq, Sk] on the mask's device."""
        from .convert import to_dense

        return to_dense(self)

    def to_coo(self) -> torch.Tensor:
        """Sparse bool COO tensor [B, Hm, Sq, Sk]."""
        return self.to_dense().to_sparse()

    def to_block_mask(self, block_size: int = 128) -> BlockMask:
        """The FlexAttention BlockMask with the same elements, without a dense S x S tensor."""
        from .convert import to_block_mask

        return to_block_mask(self, block_size)

    def inner_tiles(self) -> torch.Tensor:
        """The paper's second level: each partial tile as 8 x 8 bitmaps of 8 x 8, int64 [U, 8, 8].

        Bit 8 r + c of entry [u, i, j] is row 8 i + r, column 8 j + c of partial tile u.
        """
        octets = self.tile_bits.contiguous().view(torch.uint8).view(-1, 8, 8, 8)
        return octets.transpose(2, 3).flatten().view(torch.int64).view(-1, 8, 8)

    @cached_property
    def kept(self) -> int:
        """Number of (query, key) pairs allowed, over the shape's batch and heads. Synchronises."""
        from .convert import count_kept

        return count_kept(self)

    @property
    def density(self) -> float:
        """Share of all (query, key) pairs that is allowed. Synchronises."""
        return self.kept / max(1, self.shape.numel())

    @property
    def valid_share(self) -> float:
        """Share of the storage's 16 x 16 blocks that hold an allowed pair, noted when it was built.

        1.0 where nobody counted (a mask whose bits a compiled graph computes).
        """
        return self.plans.get("valid_share", 1.0)

    @property
    def is_known(self) -> bool:
        """Whether a builder has seen the elements, rather than a graph computed them."""
        return "valid_share" in self.plans

    @property
    def nbytes(self) -> int:
        """Bytes of storage, padding included."""
        tensors = [getattr(self, name) for name in STRUCTURE]
        tensors += [self.kv_valid] if self.kv_valid is not None else []
        return sum(t.numel() * t.element_size() for t in tensors)

    def plot(self, ax: Axes | None = None, *, batch: int = 0, head: int = 0) -> Axes:
        """Draw the mask with matplotlib (queries down, keys across) and return the axes."""
        from .plot import plot

        return plot(self, ax, batch, head)

    def _repr_html_(self) -> str:
        from .plot import html

        return html(self)

    def __repr__(self) -> str:
        text = "x".join(map(str, self.shape))
        if self.is_view:
            return f"SparseMask({text}, view, {self.device})"
        padded = "" if self.kv_valid is None else ", padded"
        return (
            f"SparseMask({text}, {100 * self.density:.1f}% kept, {self.row_ptr.shape[1] - 1} tile "
            f"rows, {len(self.run_col)} runs, {len(self.tile_bits)} distinct partial "
            f"tiles{padded}, {self.device})"
        )


def _is_zero(x: int | torch.Tensor) -> bool:
    return isinstance(x, int) and x == 0
