"""Packed documents: several sequences in one, which do not see each other."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ..errors import MaskError
from .intervals import Intervals
from .pattern import Index, Pattern, Rows


@dataclass(frozen=True, eq=False, init=False)
class Documents(Pattern):
    """Packed documents: a token attends to the tokens of its own document.

    Args:
        ids: document number of each position, a tensor or nested sequence [S] or [B, S];
            a negative number marks padding, which nobody attends to and which attends to nobody.

    Combine with `Causal()` for language models. Ids on a GPU are copied to the host once.
    """

    # As tuples for who reads them, and for JSON: most masks are built of the table alone.
    ids: tuple[tuple[int, ...], ...] = cached_property(  # type: ignore[assignment]
        lambda self: tuple(map(tuple, self.table.tolist()))
    )

    def __init__(self, ids: Any) -> None:
        ids = torch.as_tensor(ids).detach()
        if ids.ndim not in (1, 2) or ids.numel() == 0 or ids.is_floating_point():
            raise MaskError(
                "document ids must be whole numbers, [S] or [B, S] and not empty, not "
                f"{list(ids.shape)} of {ids.dtype}"
            )
        ids = ids.to("cpu", torch.int64, copy=True)
        ids = ids.reshape(-1, ids.shape[-1]).contiguous()
        object.__setattr__(self, "batch", ids.shape[0] if ids.shape[0] > 1 else None)
        object.__setattr__(self, "_table", {torch.device("cpu"): ids})

    @classmethod
    def from_position_ids(cls, position_ids: Any) -> Documents:
        """Documents of packed inputs: one begins wherever the position does not go up by one.

        >>> import torch
        >>> Documents.from_position_ids(torch.tensor([0, 1, 2, 0, 1])).ids
        ((0, 0, 0, 1, 1),)
        """
        pos = torch.as_tensor(position_ids).detach().to("cpu", torch.int64)
        begins = torch.zeros_like(pos)
        begins[..., 1:] = pos[..., 1:] != pos[..., :-1] + 1
        return cls(begins.cumsum(-1))

    @property
    def table(self) -> torch.Tensor:
        """The ids, int64 [B or 1, S], on the host."""
        return self._table[torch.device("cpu")]  # type: ignore[attr-defined]

    def _ids_on(self, device: torch.device) -> torch.Tensor:
        table: dict[torch.device, torch.Tensor] = self._table  # type: ignore[attr-defined]
        if device not in table:
            table[device] = table[torch.device("cpu")].to(device)
        return table[device]

    def __call__(self, b: Index, h: Index, q: Index, k: Index) -> torch.Tensor:
        ids = self._ids_on(q.device)
        n = ids.shape[1]
        b = b if self.batch else 0
        of_q, of_k = ids[b, q.clamp(0, n - 1)], ids[b, k.clamp(0, n - 1)]
        # Different numbers for nobody's queries and keys leave one comparison of all pairs.
        of_q = of_q.clamp(min=-1).masked_fill(q >= n, -1)
        return of_q == of_k.masked_fill((of_k < 0) | (k >= n), -2)

    @cached_property
    def fingerprint(self) -> str:
        ids = self.table.numpy()
        text = f"Documents{ids.shape}".encode() + ids.tobytes()
        return hashlib.sha256(text).hexdigest()[:24]

    @cached_property
    def _bounds(self) -> tuple[np.ndarray, np.ndarray] | None:
        """First and last + 1 key that each query sees, [B, S], if documents are contiguous."""
        ids = self.table.numpy()
        batch, n = ids.shape
        change = np.ones((batch, n), bool)
        change[:, 1:] = ids[:, 1:] != ids[:, :-1]
        for row in range(batch):
            heads = ids[row][change[row] & (ids[row] >= 0)]
            if len(np.unique(heads)) != len(heads):
                return None
        at = np.arange(n)
        first = np.maximum.accumulate(np.where(change, at, 0), axis=1)
        ends = np.where(np.roll(change, -1, axis=1) | (at == n - 1), at + 1, n)
        last = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]
        return first, last

    def structure(self, rows: Rows) -> tuple[Intervals, Intervals]:
        if self._bounds is None:
            return rows.all(), rows.none()
        first, last = self._bounds
        ids = self.table.numpy()
        n = ids.shape[1]
        b = rows.batch if self.batch else np.zeros_like(rows.batch)
        q0, q1 = np.clip(rows.first, 0, n - 1), np.clip(rows.last, 0, n - 1)
        padded = np.concatenate([np.zeros((len(ids), 1), np.int64), np.cumsum(ids < 0, 1)], 1)
        whole = (rows.last < n) & (padded[b, q1 + 1] == padded[b, q0])
        touched = rows.touched(first[b, q0], last[b, q1])
        return touched, rows.inside(first[b, q1], np.where(whole, last[b, q0], 0))
