"""The real tokens of a padded batch in one row: gathered, scattered, and the masks between them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from ..hf.combine import derived_of
from ..hf.patching import Stamp
from ..masks.device import upload
from ..masks.packed import documents, packed
from ..masks.pattern import Pattern
from ..masks.patterns import Full
from ..masks.sparse_mask import SparseMask
from .outputs import rebuild

__all__ = ["RealTokens", "round_up"]


def round_up(count: int) -> int:
    """How many rows so many tokens get: at most a 32nd more, and 63.

    Fused layers are prepared for each number of rows, Triton compiles a kernel once more where 16
    does not divide one, and memory of equal sizes is used again: 32 sizes an octave come back,
    where real tokens hardly ever do.

    >>> [round_up(count) for count in (1, 64, 1000, 16_889)]
    [64, 64, 1024, 16896]
    """
    step = max(64, 1 << max(0, count.bit_length() - 6))
    return max(1, -(-count // step)) * step


class RealTokens:
    """Where the real tokens of a batch [B, S] lie; they go to rows [1, N], in order.

    Rows behind the last real token repeat the batch's first. They see nobody, nobody sees them, and
    they are dropped in the end.

    Args:
        at: int64, ascending, b * S + s of each.
    """

    def __init__(self, batch: int, tokens: int, at: np.ndarray, device: torch.device):
        self._batch, self._tokens, self._device = batch, tokens, device
        self.rows = min(round_up(len(at)), batch * tokens)
        index = np.zeros(self.rows, np.int64)
        index[: len(at)] = at
        self._index = upload(torch.from_numpy(index), device)
        self._real = self._index[: len(at)]
        self._at, self._sequence = at, at // tokens
        self._documents = documents(self._sequence, self.rows)

    @classmethod
    def of(cls, mask: SparseMask, batch: int) -> RealTokens | None:
        """Those that the padding of a mask leaves; None where it leaves all.

        Reads that from the device, B * S / 8 bytes: the only thing here that waits for it.
        """
        octets = mask.kv_valid.cpu().contiguous().numpy().view(np.uint8)
        real = np.unpackbits(octets, axis=1, count=mask.kv_len, bitorder="little")
        if real.all():
            return None
        at = np.flatnonzero(np.broadcast_to(real, (batch, mask.kv_len)))
        return cls(batch, mask.kv_len, at, mask.device)

    @property
    def columns(self) -> torch.Tensor:
        """Positions in the sequences, int64 [1, N]."""
        return (self._index % self._tokens)[None]

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """[1, N, ...] of [B or 1, S, ...]."""
        x = x.expand(self._batch, *x.shape[1:])
        return x.flatten(0, 1).index_select(0, self._index)[None]

    def scatter(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, ...] of [1, N, ...], zeros at padding."""
        out = x.new_zeros(self._batch * self._tokens, *x.shape[2:])
        # Layers may lie on several devices.
        out.index_copy_(0, self._real.to(x.device), x[0, : len(self._real)])
        return out.unflatten(0, (self._batch, self._tokens))

    def scatter_all(self, output: Any) -> Any:
        """`scatter` of whatever a model returned; what is the same tensor twice stays so."""

        def change(x: Any, _: str | None) -> Any:
            rows = isinstance(x, torch.Tensor) and x.shape[:2] == (1, self.rows)
            return self.scatter(x) if rows else x

        return rebuild(output, change)

    def mask(self, pattern: Pattern, stamps: Iterable[Stamp]) -> SparseMask | None:
        """The mask of a pattern on sequences, and with it those of layers with patterns of their
        own, which find them there as `hf.combine.derive` does.

        None where one of the patterns means something else without padding (see `packed`).
        """
        of_sequences = self._packed(pattern)
        if of_sequences is None:
            return None
        mask = SparseMask.from_pattern(of_sequences, self.rows, device=self._device)
        for stamp in stamps:
            extra = self._packed(stamp.pattern)
            if extra is None:
                return None
            derived_of(mask)[stamp.key] = SparseMask.from_pattern(
                of_sequences & extra, self.rows, device=self._device
            )
        return mask

    def _packed(self, pattern: Pattern) -> Pattern | None:
        if type(pattern) is Full:
            return self._documents
        column = self._at - self._sequence * self._tokens
        made = packed(pattern, self._sequence, column, self.rows)
        return None if made is None else self._documents & made
