"""What a mask does where model code takes it for a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map


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

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.to_dense()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(torch.Tensor, name):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.to_dense(), name)
