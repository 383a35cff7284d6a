"""Weights of projections that stand side by side, in one tensor that is their only copy."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["pack", "unpack"]


def pack(parts: list[nn.Parameter]) -> torch.Tensor:
    """One tensor of parameters, one behind the other along their first dimension.

    The parameters become views of it: nothing is held twice, and whoever writes them writes it.
    Where they are already, the tensor is given again. To those who look, each has a storage of its
    own, of its bytes alone: safetensors refuses tensors that share one, and pickle would save all
    of it. While this runs, memory grows by one such tensor.

    Args:
        parts: [N_i, ...] of one dtype, on one device, with equal sizes but the first.

    Returns:
        [sum of N_i, ...], contiguous.

    >>> one, two = (nn.Parameter(torch.full((2, 3), x)) for x in (1.0, 2.0))
    >>> packed = pack([one, two])
    >>> two.data.fill_(5.0)[0, 0] == packed[2, 0]
    tensor(True)
    >>> two.untyped_storage().nbytes()
    24
    """
    made = _made.get(parts[0])
    packed = None if made is None else made()
    if packed is not None and _lie_in(packed, parts):
        return packed
    # Parameters outlive the inference mode that a first call may run in.
    with torch.inference_mode(False), torch.no_grad():
        packed = torch.cat([part.detach() for part in parts])
        for part, view in zip(parts, packed.split([len(part) for part in parts]), strict=True):
            # The capsule holds the whole tensor, but tells of the view only.
            part.data = torch.from_dlpack(view)
    _made[parts[0]] = weakref.ref(packed)
    return packed


#: First part -> packed tensor, as long as somebody works with it.
_made: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _lie_in(packed: torch.Tensor, parts: list[nn.Parameter]) -> bool:
    place = packed.data_ptr()
    for part in parts:
        if part.data_ptr() != place or part.dtype != packed.dtype:
            return False
        place += part.nbytes
    return place == packed.data_ptr() + packed.nbytes


def unpack(parts: Iterable[nn.Parameter]) -> None:
    """Give each parameter memory of its own again."""
    for part in parts:
        with torch.inference_mode(False):
            part.data = part.detach().clone()
