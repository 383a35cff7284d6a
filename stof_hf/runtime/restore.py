"""A model as it was: `restore`."""

from __future__ import annotations

from torch import nn

from ..fusion import install
from . import graphs, unpad

__all__ = ["restore"]


def restore(model: nn.Module) -> int:
    """Put back every layer that `tune` or `apply_tuned` replaced, and take `use_graphs` and `unpad`
    back.

    Weights that were packed get memory of their own again, so that outputs are bit for bit what
    they were. Again, it changes nothing.

    Returns:
        How many layers were put back.
    """
    graphs.take_off(model)
    unpad.take_off(model)
    return install.restore(model)
