"""What stands in front of layers: tables that ids look rows up in, and images cut into patches.

Both are told as layers, of which the first operator is called with something else than rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..errors import UnsupportedError
from .layer import Context, Layer, Operator, product

__all__ = ["lookup", "patches"]

Others = Callable[[torch.Tensor, Context], tuple[torch.Tensor, ...]]


def lookup(
    tables: tuple[nn.Embedding, ...], norm: nn.Module, others: Others = lambda ids, context: ()
) -> Layer:
    """The sum of rows of tables, and its norm.

    Args:
        tables: [V, N] each, in the order in which the module's own code adds them up.
        others: (ids, context) -> the ids of all tables but the first, [1 or B, 1 or S].

    Raises:
        UnsupportedError: a table that shortens the rows that are looked up.

    >>> layer = lookup((nn.Embedding(97, 8), nn.Embedding(50, 8)), nn.LayerNorm(8),
    ...                lambda ids, context: (torch.arange(ids.shape[1])[None],))
    >>> layer.begin(torch.zeros(2, 5, dtype=torch.long), Context()).shape
    torch.Size([2, 5, 1])
    >>> layer.begin(torch.zeros(2, 5), Context()) is None
    True
    """
    if any(getattr(table, "max_norm", None) is not None for table in tables):
        raise UnsupportedError("its embeddings have a max_norm")

    def enter(ids: torch.Tensor, context: Context) -> torch.Tensor | None:
        if ids.ndim != 2 or not _counts(ids):
            return None
        context.ids = others(ids, context)
        fit = all(_counts(at) and _broadcasts(at, ids) for at in context.ids)
        return ids.unsqueeze(-1) if fit else None

    return Layer((Operator("embed", tables), Operator("norm", (norm,))), False, enter=enter)


def _counts(ids: torch.Tensor) -> bool:
    return ids.dtype in (torch.int64, torch.int32)


def _broadcasts(ids: torch.Tensor, like: torch.Tensor) -> bool:
    sizes = zip(ids.shape, like.shape, strict=False)
    return ids.ndim == 2 and ids.device == like.device and all(n in (1, m) for n, m in sizes)


def patches(projection: nn.Conv2d) -> Layer:
    """A convolution without overlap, as the product that it is.

    Raises:
        UnsupportedError: any other convolution, or one whose weight [N, C, height, width] is not
            contiguous, and so no matrix.

    >>> layer = patches(nn.Conv2d(3, 8, kernel_size=4, stride=4))
    >>> layer.names
    ('gemm', 'bias')
    >>> layer.begin(torch.zeros(2, 3, 12, 8), Context()).shape
    torch.Size([2, 6, 48])
    """
    if type(projection) is not nn.Conv2d:
        raise UnsupportedError(f"its projection is a {type(projection).__name__}, not nn.Conv2d")
    size, apart = projection.kernel_size, (projection.stride, projection.padding)
    if apart != (size, (0, 0)) or projection.dilation != (1, 1) or projection.groups != 1:
        raise UnsupportedError(f"its patches overlap or lie apart: {projection}")
    if not projection.weight.is_contiguous():
        raise UnsupportedError("its weight is not contiguous (channels_last)")

    def enter(pixels: torch.Tensor, context: Context) -> torch.Tensor | None:
        if pixels.ndim != 4 or pixels.shape[1] != projection.in_channels:
            return None
        if pixels.shape[2] % size[0] or pixels.shape[3] % size[1]:
            return None
        cut = pixels.unflatten(3, (-1, size[1])).unflatten(2, (-1, size[0]))
        # The one copy.
        return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    return Layer(product(projection), False, enter=enter)
