"""What a mask does where model code takes it for a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

#: Kernels for views work row by row, which suits few rows only.
FEW_ROWS = 16

_ADD = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_JOIN = {"cat", "concat", "concatenate"}


class ActsAsTensor:
    """Mixin: tensor operations on the mask work on its dense bool form, [B, H, Sq, Sk].

    A few models compute with their mask outside attention (an indexer that selects keys, a pooling
    head). They get what they would get from sdpa's mask, at its price. Where they add it to floats
    or append floats to it, they mean eager attention's: 0 where allowed, else the least number.
    """

    def to_dense(self) -> torch.Tensor:
        raise NotImplementedError

    def to_additive(self, dtype: torch.dtype) -> torch.Tensor:
        """[B, H, Sq, Sk] as eager attention adds it: 0 where allowed, else the least number."""
        allowed = self.to_dense()
        zero = torch.zeros((), dtype=dtype, device=allowed.device)
        return torch.where(allowed, zero, torch.finfo(dtype).min)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        floats = [
            x.dtype
            for x in (tree_leaves(args) if name in _ADD | _JOIN else ())
            if isinstance(x, torch.Tensor) and x.is_floating_point()
        ]

        def dense(x: Any) -> Any:
            if not isinstance(x, ActsAsTensor):
                return x
            return x.to_additive(floats[0]) if floats else x.to_dense()

        args, kwargs = tree_map(dense, args), tree_map(dense, kwargs or {})
        if name in _JOIN and (args[1:] or (kwargs.get("dim", 0),))[0]:
            # A mask that is the same for the whole batch holds it once.
            batch = max(x.shape[0] for x in args[0])
            joined = [x if x.shape[0] > 1 else x.expand(batch, *x.shape[1:]) for x in args[0]]
            args = (joined, *args[1:])
        return func(*args, **kwargs)

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
