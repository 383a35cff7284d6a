"""What a mask does where model code takes it for a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map

#: Kernels for views work row by row, which suits few rows only.
FEW_ROWS = 16


class ActsAsTensor:
    """Mixin: tensor operations on the mask work on its dense bool form, [B, H, Sq, Sk].

    A few models compute with their mask outside attention (an indexer that selects keys, a pooling
    head). They get what they would get from sdpa's mask, at its price.
    """

    def to_dense(self) -> torch.Tensor:
        raise NotImplementedError

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def dense(x: Any) -> Any:
            return x.to_dense() if isinstance(x, ActsAsTensor) else x

        return func(*tree_map(dense, args), **tree_map(dense, kwargs or {}))

    def __getitem__(self, index: Any) -> Any:
        """A dense tensor; but all keys of a few queries, as Gemma 4 takes them, stay a mask."""
        if isinstance(index, tuple) and len(index) == 4 and not self.is_view:
            every = slice(None)
            batch, head, queries, keys = index
            if batch == head == keys == every and isinstance(queries, slice):
                start, stop, step = queries.indices(self.q_len)
                if step == 1 and 0 < stop - start <= FEW_ROWS:
                    rows = self.rows(start, stop - start, self.kv_len)
                    return rows.with_words(self.kv_valid)
        return self.to_dense()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(torch.Tensor, name):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.to_dense(), name)
