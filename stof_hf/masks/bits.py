"""Booleans to 64-bit words and back: bit c of a word is column c."""

import torch
import torch.nn.functional as F

TILE = 64
# Multiplying eight 0/1 bytes by this constant gathers them into the top byte of the product.
_GATHER = 0x0102040810204080


def words_per(length: int) -> int:
    """Number of 64-bit words (tiles) that hold `length` bits."""
    return -(-length // TILE)


def pack(x: torch.Tensor) -> torch.Tensor:
    """Pack a bool tensor [..., n] into int64 words [..., ceil(n/64)], zero beyond n.

    Runs on any device without synchronising; the largest temporary is as large as the input.

    >>> pack(torch.tensor([True, False, True]))
    tensor([5])
    """
    n = x.shape[-1]
    if n % TILE:
        x = F.pad(x, (0, TILE - n % TILE))
    x = x.contiguous()
    # Inductor of PyTorch 2.11 views no booleans as bytes.
    zeros_and_ones = x.to(torch.uint8) if torch.compiler.is_compiling() else x.view(torch.uint8)
    lanes = zeros_and_ones.view(torch.int64)
    octets = ((lanes * _GATHER) >> 56).to(torch.uint8)
    return octets.view(torch.int64)


def unpack(words: torch.Tensor, n: int) -> torch.Tensor:
    """Inverse of `pack`: int64 words [..., w] to bool [..., n], n <= 64 w."""
    # A view as bytes needs a last stride of 1, which contiguous() leaves open for single words.
    octets = words.contiguous().as_strided((words.numel(),), (1,)).view(torch.uint8)
    lanes = (octets[:, None] >> torch.arange(8, dtype=torch.uint8, device=words.device)) & 1
    return lanes.view(torch.bool).view(*words.shape[:-1], words.shape[-1] * TILE)[..., :n]


def transpose(words: torch.Tensor) -> torch.Tensor:
    """Tiles of 64 words, int64 [..., 64], with rows and columns swapped.

    Squares of 32, 16, ... 1 bits change places (Warren, Hacker's Delight, 7-3): six passes over the
    words, where unpacked bits would take eight times their memory.

    >>> transpose(pack(torch.eye(64, dtype=torch.bool)).view(1, 64))[0, 5].item() == 1 << 5
    True
    """
    out = words.clone(memory_format=torch.contiguous_format)
    size, low = TILE // 2, (1 << TILE // 2) - 1
    while size:
        pairs = out.view(*out.shape[:-1], TILE // 2 // size, 2, size)
        upper, lower = pairs[..., 0, :], pairs[..., 1, :]
        # The sign that this shift draws in lies above every bit of `low`.
        changed = ((upper >> size) ^ lower) & low
        lower ^= changed
        upper ^= changed << size
        size //= 2
        low ^= low << size
    return out
