"""What tensor descriptors (TMA) can describe, and where there are any; needs no Triton."""

from __future__ import annotations

import torch

__all__ = ["describes", "has_tma", "readable"]


def has_tma(device: torch.device) -> bool:
    """Whether a GPU has TMA, from Hopper on; what is no GPU stands in for one."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def describes(x: torch.Tensor) -> bool:
    """Whether TMA reads and writes a matrix: the elements of its rows, or of its columns, lie side
    by side, and 16 bytes divide the address and the distance of these."""
    length, apart = x.shape[1], x.stride(0)
    if x.stride(1) != 1:
        length, apart = x.shape[0], x.stride(1) if x.stride(0) == 1 else 0
    return apart >= length and apart * x.itemsize % 16 == 0 and x.data_ptr() % 16 == 0


def readable(x: torch.Tensor | None) -> torch.Tensor | None:
    """Rows, copied where TMA does not read them: whatever a caller cut out of something else."""
    if x is None or (x.stride(1) == 1 and describes(x)):
        return x
    return x.clone(memory_format=torch.contiguous_format)
